// openid-client: `form` is its default, `basic` one more argument.

import * as oidc from "openid-client";

import { answer, asked } from "../jobs.mjs";

const AUTHENTICATION = {
  form: () => undefined,
  basic: (key) => oidc.ClientSecretBasic(key),
};

async function getToken(job) {
  const config = await oidc.discovery(
    new URL(job.issuer),
    job.id,
    job.key,
    AUTHENTICATION[job.mode](job.key),
    // Its documented switch for plain http; leave it out where the issuer is https.
    { algorithm: "oauth2", execute: [oidc.allowInsecureRequests] },
  );
  const tokens = await oidc.clientCredentialsGrant(config, asked(job));
  return { token: tokens.access_token, scope: tokens.scope };
}

function told(error) {
  const facts = { status: error.status, retry_after: error.response?.headers.get("retry-after") };
  if (error instanceof oidc.WWWAuthenticateChallengeError) {
    // The sentence is in `cause`: one entry per challenge, each with its parameters.
    const { error: code, error_description } = error.cause[0].parameters;
    return { ...facts, code, text: error_description };
  }
  // The sentence is in `error_description`.
  return { ...facts, code: error.error, text: error.error_description };
}

await answer(getToken, told);
