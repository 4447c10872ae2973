// @badgateway/oauth2-client: it encodes Basic in another way once it has read our metadata.

import { OAuth2Client } from "@badgateway/oauth2-client";

import { answer } from "../jobs.mjs";

const SETTINGS = {
  discovered: () => ({}),
  basic: () => ({ tokenEndpoint: "/oauth/token" }),
  form: () => ({ tokenEndpoint: "/oauth/token", authenticationMethod: "client_secret_post" }),
};

async function getToken(job) {
  const client = new OAuth2Client({
    server: job.issuer,
    clientId: job.id,
    clientSecret: job.key,
    ...SETTINGS[job.mode](),
  });
  const token = await client.clientCredentials({
    scope: job.scope?.split(" "),
    resource: job.resource,
  });
  return { token: token.accessToken, scope: token.scope?.join(" ") };
}

function told(error) {
  // The sentence is part of `message`.
  return {
    status: error.httpCode,
    retry_after: error.response.headers.get("retry-after"),
    code: error.oauth2Code,
    text: error.message,
  };
}

await answer(getToken, told);
