// `npm run lock`: pin again what package.json names, here and in runtime/.
//
// npm leaves the registry's address out of the lock files, as .npmrc says, but writes down where
// each package asks for donations.  That goes, too: a lock file holds versions and hashes.

import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";

for (const folder of [".", "runtime"]) {
  execFileSync("npm", ["install", "--package-lock-only"], { cwd: folder, stdio: "inherit" });
  const path = `${folder}/package-lock.json`;
  const lock = JSON.parse(readFileSync(path, "utf8"));
  for (const locked of Object.values(lock.packages)) {
    delete locked.funding;
  }
  writeFileSync(path, `${JSON.stringify(lock, null, 2)}\n`);
}
