// What every driver does: a list of jobs in on standard input, a list of answers out.
//
// API keys travel on standard input alone: arguments and environment of a process can be read by
// others.  One process does all jobs of one library, because starting node costs more than they do.

import { json } from "node:stream/consumers";

/**
 * Do the jobs one after the other, and print what came of each.
 *
 * @param work one job → its answer; throws what the library throws.
 * @param told the library's exception → what its documentation says can be read from it.
 */
export async function answer(work, told) {
  const answers = [];
  for (const job of await json(process.stdin)) {
    try {
      answers.push(await work(job));
    } catch (error) {
      const kind = error.constructor.name;
      answers.push({ error: { kind, message: error.message, ...told(error) } });
    }
  }
  process.stdout.write(JSON.stringify(answers));
}

/** The parameters that a job asks for, by their names in OAuth. */
export function asked({ scope, resource }) {
  return { ...(scope && { scope }), ...(resource && { resource }) };
}
