// oauth4webapi: the caller picks how the key is sent.

import * as oauth from "oauth4webapi";

import { answer, asked } from "../jobs.mjs";

// Its documented switch for plain http; leave it out where the issuer is https.
const PLAIN_HTTP = { [oauth.allowInsecureRequests]: true };
const AUTHENTICATION = { basic: oauth.ClientSecretBasic, form: oauth.ClientSecretPost };

async function getToken(job) {
  const issuer = new URL(job.issuer);
  const discovered = await oauth.discoveryRequest(issuer, { algorithm: "oauth2", ...PLAIN_HTTP });
  const server = await oauth.processDiscoveryResponse(issuer, discovered);
  const client = { client_id: job.id };
  const response = await oauth.clientCredentialsGrantRequest(
    server,
    client,
    AUTHENTICATION[job.mode](job.key),
    asked(job),
    PLAIN_HTTP,
  );
  const tokens = await oauth.processClientCredentialsResponse(server, client, response);
  return { token: tokens.access_token, scope: tokens.scope };
}

function told(error) {
  const facts = { status: error.status, retry_after: error.response?.headers.get("retry-after") };
  if (error instanceof oauth.WWWAuthenticateChallengeError) {
    // The sentence is in `cause`: one entry per challenge, each with its parameters.
    const { error: code, error_description } = error.cause[0].parameters;
    return { ...facts, code, text: error_description };
  }
  // The sentence is in `error_description`.
  return { ...facts, code: error.error, text: error.error_description };
}

await answer(getToken, told);
