// jsonwebtoken with jwks-rsa, the pair that Express users have.

import jwt from "jsonwebtoken";
import jwksClient from "jwks-rsa";

import { answer } from "../jobs.mjs";

const keySets = new Map();

function keySet(url) {
  if (!keySets.has(url)) {
    keySets.set(url, jwksClient({ jwksUri: url }));
  }
  return keySets.get(url);
}

async function verify({ jwks_uri, token, issuer, audience, algorithms }) {
  const { kid } = jwt.decode(token, { complete: true }).header;
  const signingKey = await keySet(jwks_uri).getSigningKey(kid);
  const claims = jwt.verify(token, signingKey.getPublicKey(), { issuer, audience, algorithms });
  return { claims };
}

await answer(verify, ({ name, message }) => ({ code: name, text: message }));
