// simple-oauth2: Basic by default, the body by an option.

import { ClientCredentials } from "simple-oauth2";

import { answer, asked } from "../jobs.mjs";

const METHODS = { basic: "header", form: "body" };

async function getToken(job) {
  const client = new ClientCredentials({
    client: { id: job.id, secret: job.key },
    auth: { tokenHost: job.issuer, tokenPath: "/oauth/token" },
    options: { authorizationMethod: METHODS[job.mode] },
  });
  const { token } = await client.getToken(asked(job));
  return { token: token.access_token, scope: token.scope };
}

function told(error) {
  // `message` is the status line alone.  The body is in `data.payload`, as @hapi/wreck documents,
  // which makes the requests.
  const { payload, headers } = error.data;
  return {
    status: error.output.statusCode,
    retry_after: headers["retry-after"],
    code: payload.error,
    text: payload.error_description,
  };
}

await answer(getToken, told);
