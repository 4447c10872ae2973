// jose: a key set that it fetches and keeps, and every check that it has a setting for.

import { createRemoteJWKSet, jwtVerify } from "jose";

import { answer } from "../jobs.mjs";

const keySets = new Map();

function keySet(url) {
  if (!keySets.has(url)) {
    keySets.set(url, createRemoteJWKSet(new URL(url)));
  }
  return keySets.get(url);
}

async function verify({ jwks_uri, token, issuer, audience, algorithms }) {
  const { payload } = await jwtVerify(token, keySet(jwks_uri), {
    typ: "at+jwt",
    issuer,
    audience,
    algorithms,
  });
  return { claims: payload };
}

await answer(verify, ({ code, claim }) => ({ code, text: claim }));
