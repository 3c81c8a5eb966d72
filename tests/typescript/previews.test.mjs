// Ports exposed to the outside, named preview URLs, and private previews.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import {
  InboundDisabledError, PortLimitExceededError, QuotaExceededError, SandboxError, SessionNotFoundError,
  SessionTerminatedError,
} from "@tenkicloud/sandbox";
import { call, refused } from "./lib/connect.mjs";
import { SMALL, client, eventually, rejection, shell, unique } from "./lib/helpers.mjs";
import { Server } from "./lib/server.mjs";

const UNKNOWN = "01890000-0000-7000-8000-00000000dead";

let server;
let tenki;
let session;
before(async () => {
  server = await Server.start();
  tenki = client(server);
  session = await tenki.create(SMALL);
  await serve(session, 3000, "one");
});
after(async () => {
  await session?.close();
  await tenki?.[Symbol.asyncDispose]();
  await server?.remove();
});

/** Starts a web server in the sandbox whose only file says this. */
async function serve(sandbox, port, text) {
  await shell(sandbox, `mkdir -p www-${port} && echo ${text} > www-${port}/index.html`);
  const command = `python3 -m http.server ${port} --bind 127.0.0.1 --directory www-${port}`;
  await shell(sandbox, `setsid ${command} >/dev/null 2>&1 </dev/null &`);
  await shell(sandbox, `timeout 20 sh -c 'until python3 -c "import socket; socket.create_connection((\\"127.0.0.1\\", ${port}))" 2>/dev/null; do sleep 0.05; done'`);
}

/** What a browser gets: status and text. */
async function visit(url) {
  const response = await fetch(url);
  return [response.status, (await response.text()).trim()];
}

/** The HTTP status, also of a place where nobody listens any more. */
async function status(url) {
  try {
    return (await fetch(url)).status;
  } catch {
    return 0;
  }
}

const invalid = async (promise) => {
  const error = await rejection(promise, SandboxError);
  assert.equal(error.cause.code, 3, error.message);
};

describe("an exposed port", () => {
  test("is fetched by its URL, listed, and gone when it is unexposed", async () => {
    const exposed = await session.exposePort(3000);
    assert.deepEqual([exposed.port, exposed.expiresAt, exposed.slug, exposed.previewUrlId], [3000, undefined, undefined, undefined]);
    assert.deepEqual(await visit(exposed.previewUrl), [200, "one"]);
    assert.equal((await session.exposePort(3000)).previewUrl, exposed.previewUrl, "exposing it again changes nothing");
    assert.deepEqual(await session.listExposedPorts(), [exposed]);
    await session.unexposePort(3000);
    assert.ok([0, 404].includes(await status(exposed.previewUrl)));
    assert.deepEqual(await session.listExposedPorts(), []);
    await session.unexposePort(3000);
    const again = await session.exposePort(3000);
    assert.deepEqual(await visit(again.previewUrl), [200, "one"]);
    await session.unexposePort(3000);
  });

  test("ends when its time is over", async () => {
    const exposed = await session.exposePort(3000, { ttlMs: 1_500 });
    assert.ok(Math.abs(exposed.expiresAt.getTime() - Date.now()) < 2_000);
    assert.deepEqual(await visit(exposed.previewUrl), [200, "one"]);
    await eventually("the preview is gone", async () => [0, 404].includes(await status(exposed.previewUrl)));
    assert.deepEqual(await session.listExposedPorts(), []);
  });

  test("is there before anything listens on it", async () => {
    const exposed = await session.exposePort(3999);
    assert.equal((await fetch(exposed.previewUrl)).status, 502);
    await session.unexposePort(3999);
  });

  test("is refused for its reason", async () => {
    for (const port of [0, -1, 65_536]) await invalid(session.exposePort(port));
    await invalid(session.unexposePort(0));
    for (const slug of ["ab", "Upper", "a--b", "-abc", "www", "x".repeat(64)]) await invalid(session.exposePort(3000, { slug }));
    await refused(server, "ExposePort", { sessionId: session.id, port: 3000, expiresAt: "2001-01-01T00:00:00Z" }, "invalid_argument");
    await refused(server, "ExposePort", { sessionId: UNKNOWN, port: 3000 }, "not_found");
    const closed = await tenki.create({ ...SMALL, allowInbound: false });
    const error = await rejection(closed.exposePort(3000), InboundDisabledError);
    assert.match(error.message, /inbound access is disabled/i);
    await closed.close();
    await rejection(closed.exposePort(3000), SessionTerminatedError);
  });

  test("is one of so many", async () => {
    const other = await tenki.create(SMALL);
    let made = 0;
    const error = await rejection((async () => {
      for (let port = 10_000; port < 10_100; port++, made++) await other.exposePort(port);
    })(), PortLimitExceededError);
    assert.match(error.message, /maximum exposed ports/);
    assert.equal((await other.listExposedPorts()).length, made);
    await other.close();
  });

  test("goes with its session", async () => {
    const other = await tenki.create(SMALL);
    const exposed = await other.exposePort(80);
    assert.equal(await status(exposed.previewUrl), 502);
    await other.close();
    await eventually("the preview is gone", async () => [0, 404].includes(await status(exposed.previewUrl)));
  });
});

describe("a named preview URL", () => {
  test("is made, found, bound, unbound and deleted", async () => {
    const slug = unique("shop");
    const made = await tenki.previewUrls.create(slug);
    assert.deepEqual([made.slug, made.sessionId, made.port], [slug, undefined, undefined]);
    assert.equal(made.workspaceId, (await tenki.whoAmI()).workspaces[0].id);
    assert.ok(Math.abs(made.createdAt.getTime() - Date.now()) < 60_000);
    assert.deepEqual(await tenki.previewUrls.get(made.id), made);
    assert.ok((await tenki.previewUrls.list()).some(({ id }) => id === made.id));
    assert.equal((await call(server, "GetPreviewUrl", { slug })).previewUrl.id, made.id);
    assert.ok((await status(made.previewUrl)) >= 400, "it leads nowhere yet");

    const bound = await tenki.previewUrls.bind(made.id, session.id, 3000);
    assert.deepEqual([bound.sessionId, bound.port, bound.previewUrl], [session.id, 3000, made.previewUrl]);
    assert.deepEqual(await visit(made.previewUrl), [200, "one"]);
    const visited = await eventually("the visit is noted", async () => (await tenki.previewUrls.get(made.id)).lastAccessedAt);
    assert.ok(Math.abs(visited.getTime() - Date.now()) < 60_000);
    const [listed] = await session.listExposedPorts();
    assert.deepEqual([listed.slug, listed.previewUrlId, listed.previewUrl], [slug, made.id, made.previewUrl]);

    const unbound = await tenki.previewUrls.unbind(made.id);
    assert.deepEqual([unbound.sessionId, unbound.port], [undefined, undefined]);
    assert.ok((await status(made.previewUrl)) >= 400);
    await tenki.previewUrls.delete(made.id);
    await rejection(tenki.previewUrls.get(made.id), SessionNotFoundError);
    await rejection(tenki.previewUrls.delete(made.id), SessionNotFoundError);
    assert.ok([0, 404].includes(await status(made.previewUrl)));
  });

  test("outlives its session, and is led to the next one", async () => {
    const slug = unique("blue-green");
    const blue = await tenki.create(SMALL);
    const green = await tenki.create(SMALL);
    await Promise.all([serve(blue, 8000, "blue"), serve(green, 8001, "green")]);
    const exposed = await blue.exposePort(8000, { slug });
    assert.deepEqual(await visit(exposed.previewUrl), [200, "blue"]);
    // Nobody who was answered is dropped while it is led elsewhere.
    const seen = new Set();
    let switched = false;
    const visitors = Array.from({ length: 4 }, async () => {
      for (let after = 0; after < 5; ) {
        const [code, text] = await visit(exposed.previewUrl);
        assert.equal(code, 200, text);
        seen.add(text);
        if (switched) after += 1;
      }
    });
    await tenki.previewUrls.bind(exposed.previewUrlId, green.id, 8001);
    switched = true;
    await Promise.all(visitors);
    assert.deepEqual([...seen].sort(), ["blue", "green"]);
    assert.deepEqual(await visit(exposed.previewUrl), [200, "green"]);
    await green.close();
    await eventually("visitors are told that it has ended", async () => (await status(exposed.previewUrl)) === 410);
    const orphan = await tenki.previewUrls.get(exposed.previewUrlId);
    assert.deepEqual([orphan.sessionId, orphan.port], [green.id, 8001]);
    assert.equal((await blue.exposePort(8000, { slug })).previewUrlId, exposed.previewUrlId);
    assert.deepEqual(await visit(exposed.previewUrl), [200, "blue"]);
    await blue.close();
    await tenki.previewUrls.delete(exposed.previewUrlId);
  });

  test("is refused for its reason", async () => {
    const made = await tenki.previewUrls.create(unique("taken"));
    const taken = await rejection(tenki.previewUrls.create(made.slug), SandboxError);
    assert.equal(taken.cause.code, 6, taken.message);
    for (const slug of ["", "ab", "a_b", "api"]) await invalid(tenki.previewUrls.create(slug));
    await invalid(tenki.previewUrls.create(unique("half"), { sessionId: session.id }));
    await invalid(tenki.previewUrls.create(unique("half"), { port: 3000 }));
    await rejection(tenki.previewUrls.create(unique("lost"), { sessionId: UNKNOWN, port: 80 }), SessionNotFoundError);
    await rejection(tenki.previewUrls.bind(made.id, UNKNOWN, 80), SessionNotFoundError);
    await rejection(tenki.previewUrls.bind(UNKNOWN, session.id, 80), SessionNotFoundError);
    await invalid(tenki.previewUrls.bind(made.id, session.id, 0));
    await refused(server, "GetPreviewUrl", {}, "invalid_argument");
    await refused(server, "GetPreviewUrl", { previewUrlId: "x" }, "invalid_argument");
    await refused(server, "ListPreviewUrls", { pageToken: "nonsense" }, "invalid_argument");
    await tenki.previewUrls.delete(made.id);
  });

  test("counts against the workspace's limit, and lists have pages", async () => {
    const made = [];
    for (let n = 0; n < 5; n++) made.unshift(await tenki.previewUrls.create(unique("page")));
    const first = await call(server, "ListPreviewUrls", { pageSize: 3 });
    const second = await call(server, "ListPreviewUrls", { pageSize: 3, pageToken: first.nextPageToken });
    const listed = [...first.previewUrls, ...second.previewUrls].map(({ id }) => id).slice(0, 5);
    assert.deepEqual(listed, made.map(({ id }) => id));
    const [{ workspaceId }] = (await call(server, "WhoAmI")).workspaces;
    const { settings } = await call(server, "GetWorkspaceSandboxSettings", { workspaceId });
    await call(server, "UpdateWorkspaceSandboxSettings", { workspaceId: settings.workspaceId, maxPreviewUrlsPerWorkspace: 5 });
    await rejection(tenki.previewUrls.create(unique("more")), QuotaExceededError);
    await call(server, "UpdateWorkspaceSandboxSettings", { workspaceId: settings.workspaceId, clearMaxPreviewUrlsPerWorkspace: true });
    for (const { id } of made) await tenki.previewUrls.delete(id);
  });

  test("of a closed session lets nobody in", async () => {
    const closed = await tenki.create({ ...SMALL, allowInbound: false });
    const made = await tenki.previewUrls.create(unique("closed"), { sessionId: closed.id, port: 80 });
    assert.equal(await status(made.previewUrl), 403);
    await closed.close();
    await tenki.previewUrls.delete(made.id);
  });
});

describe("a private preview", () => {
  test("opens for those who have the token", async () => {
    const opened = await call(server, "OpenPreview", { sessionId: session.id, port: 3000 });
    assert.equal(opened.port, 3000);
    assert.ok(Math.abs(new Date(opened.expiresAt).getTime() - Date.now() - 3_600_000) < 60_000);
    const url = new URL(opened.previewUrl);
    assert.deepEqual(await follow(url), [200, "one"]);
    assert.ok([401, 403].includes(await status(url.origin)), "without a token");
    url.search = url.search.replace(/.$/, (last) => (last === "A" ? "B" : "A"));
    assert.ok([401, 403].includes(await status(url)), "with another token");

    const { lastAccessedAt } = await call(server, "TouchPreview", { previewToken: opened.viewerToken });
    assert.ok(Math.abs(new Date(lastAccessedAt).getTime() - Date.now()) < 60_000);
    const resolved = await call(server, "ResolvePreviewToken", { token: opened.viewerToken });
    assert.deepEqual([resolved.sessionId, resolved.port, resolved.mode, resolved.isOffline ?? false], [session.id, 3000, "private", false]);
    assert.deepEqual(await session.listExposedPorts(), []);
    await refused(server, "TouchPreview", { previewToken: "" }, "invalid_argument");
    await refused(server, "ResolvePreviewToken", { token: "nvt1.forged" }, "not_found");
    await refused(server, "OpenPreview", { sessionId: session.id, port: 0 }, "invalid_argument");
  });

  /** What a browser does: it keeps cookies while it is redirected. */
  async function follow(url) {
    const cookies = [];
    for (let hops = 0; hops < 5; hops++) {
      const response = await fetch(url, { redirect: "manual", headers: cookies.length > 0 ? { cookie: cookies.join("; ") } : {} });
      cookies.push(...response.headers.getSetCookie().map((cookie) => cookie.split(";")[0]));
      if (response.status < 300 || response.status > 399) return [response.status, (await response.text()).trim()];
      url = new URL(response.headers.get("location"), url);
    }
    assert.fail("redirected for ever");
  }
});

test("a visitor does not undo a pause that was asked for", async () => {
  const paused = await tenki.create(SMALL);
  await serve(paused, 8000, "awake");
  const { previewUrl } = await paused.exposePort(8000);
  assert.deepEqual(await visit(previewUrl), [200, "awake"]);
  await paused.pause();
  assert.equal(await status(previewUrl), 404);
  assert.match(await (await fetch(previewUrl)).text(), /the sandbox behind this preview is paused/);
  assert.equal((await tenki.get(paused.id)).state, "PAUSED");
  await paused.resume();
  assert.deepEqual(await visit(previewUrl), [200, "awake"]);
  await paused.close();
});

for (const [accident, end] of [["SIGTERM", () => server.stop()], ["kill -9", () => server.kill()]]) {
  test(`URLs work again after ${accident}`, async () => {
    const slug = unique("kept");
    const named = await session.exposePort(3000, { slug });
    const plain = await session.exposePort(3000);
    await tenki[Symbol.asyncDispose]();
    await end();
    await server.restart();
    tenki = client(server);
    session = await tenki.get(session.id);
    for (const { previewUrl } of [named, plain]) assert.deepEqual(await visit(previewUrl), [200, "one"]);
    const listed = await session.listExposedPorts();
    assert.deepEqual(new Set(listed.map(({ previewUrl }) => previewUrl)), new Set([named.previewUrl, plain.previewUrl]));
    await tenki.previewUrls.delete(named.previewUrlId);
    await session.unexposePort(3000);
  });
}
