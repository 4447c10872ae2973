// jose as a resource server runs it: a key set that is kept for as long as the issuer says, and no
// second look when a token names a signing key that it does not hold.
//
// The first line says where and for how long; each line after that is a token, answered by a line.

import { createInterface } from "node:readline";

import { createRemoteJWKSet, jwtVerify } from "jose";

let keySet;

for await (const line of createInterface({ input: process.stdin })) {
  const { jwks_uri, max_age_s, token, issuer, audience } = JSON.parse(line);
  keySet ??= createRemoteJWKSet(new URL(jwks_uri), { cacheMaxAge: max_age_s * 1000 });
  let answer = "";
  if (token) {
    try {
      await jwtVerify(token, keySet, { typ: "at+jwt", issuer, audience });
    } catch (error) {
      answer = error.code ?? error.message;
    }
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
