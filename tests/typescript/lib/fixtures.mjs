// What the tests of a file share, made before them and removed after them.

import { after, before } from "node:test";
import { SMALL, client } from "./helpers.mjs";
import { sharedServer } from "./server.mjs";

/** Hands `{ server, tenki }`, a server and a client of it, to `take` before the tests of this file. */
export function useClient(take) {
  use(take, async () => ({}));
}

/** Hands `{ server, tenki, session }` to `take`: the same, with a small sandbox. */
export function useSandbox(take) {
  use(take, async (tenki) => ({ session: await tenki.create(SMALL) }));
}

function use(take, more) {
  let made = {};
  before(async () => {
    made.server = await sharedServer();
    made.tenki = client(made.server);
    Object.assign(made, await more(made.tenki));
    take(made);
  });
  after(async () => {
    await made.session?.close();
    await made.tenki?.[Symbol.asyncDispose]();
    await made.server?.remove();
  });
}
