// A browser opens the preview of a development server in a sandbox. What is edited in the sandbox shows in the page,
// which is not loaded again: the development server tells it through a WebSocket of the same preview.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { X509Certificate, createHash } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { chromium } from "playwright-core";
import { bytes, client, eventually, shell } from "../typescript/lib/helpers.mjs";
import { Server } from "../typescript/lib/server.mjs";

// Chromium drops its connections whenever the host's network changes. So no sandbox with a link is pre-created.
const POOLS = "[pools]\nslots_ready = 0\nisolated_slots_ready = 1\n";
const TLS = `certificate_file = "${process.env.PREVIEW_CERTIFICATE}"\nkey_file = "${process.env.PREVIEW_KEY}"\n`;

/** Where a development server listens that was not told otherwise. */
const PORT = 5173;
const OTHER_PORT = 5174;

/** The ways to previews: the server's configuration, what a URL looks like there, and what the browser speaks. */
const EDGES = {
  "a port of its own on the loopback": {
    configuration: POOLS,
    url: /^http:\/\/127\.0\.0\.1:\d+/,
    environment: "",
    protocol: "http/1.1",
  },
  "a host name below a domain, over TLS": {
    configuration: `preview_domain = "preview.test"\n[tls]\n${TLS}${POOLS}`,
    url: /^https:\/\/[a-z0-9-]+\.preview\.test:\d+/,
    // Vite answers to hosts that it knows only, whoever leads them to it.
    environment: "__VITE_ADDITIONAL_SERVER_ALLOWED_HOSTS=.preview.test",
    protocol: "h2",
  },
};

function browserPath() {
  const path = process.env.CHROMIUM ?? "/usr/bin/chromium";
  if (!existsSync(path)) throw new Error(`there is no browser at ${path}: ./scripts/install-packages test installs it`);
  return path;
}

/** The key of the previews' certificate, as Chromium is told that it may trust it. */
function trustedKey() {
  const { publicKey } = new X509Certificate(readFileSync(process.env.PREVIEW_CERTIFICATE));
  return createHash("sha256").update(publicKey.export({ type: "spki", format: "der" })).digest("base64");
}

let browser;
before(async () => {
  browser = await chromium.launch({
    executablePath: browserPath(),
    args: [
      // It reaches previews and nothing else.
      "--host-resolver-rules=MAP *.preview.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
      `--ignore-certificate-errors-spki-list=${trustedKey()}`,
    ],
  });
});
after(() => browser?.close());

/** Copies the project with its modules into the sandbox, which reaches no registry. */
async function install(session) {
  const project = execFileSync("tar", ["-C", import.meta.dirname, "-c", "app"], { maxBuffer: 1 << 30 });
  await session.writeFile("app.tar", project);
  await shell(session, "tar -xf app.tar && rm app.tar");
}

const develop = (session, port, environment) =>
  shell(session, `cd app && ${environment} setsid npm run dev -- --port ${port} --strictPort >/home/tenki/${port}.log 2>&1 </dev/null &`);

const edit = (session, file, content) => session.writeFile(`app/${file}`, bytes(content));

/** Everything that the page hears from its development server, and from where. */
function listen(page) {
  const sockets = [];
  page.on("websocket", (socket) => {
    const heard = { url: new URL(socket.url()), messages: [] };
    sockets.push(heard);
    socket.on("framereceived", ({ payload }) => heard.messages.push(JSON.parse(payload)));
  });
  return sockets;
}

for (const [name, edge] of Object.entries(EDGES)) {
  describe(`through ${name}`, () => {
    let server;
    let tenki;
    let session;
    before(async () => {
      server = await Server.start({ configuration: edge.configuration });
      tenki = client(server);
      session = await tenki.create({ cpuCores: 2, memoryMb: 1024, allowOutbound: false });
      await install(session);
    });
    after(async () => {
      await session?.close();
      await tenki?.[Symbol.asyncDispose]();
      await server?.remove();
    });

    test("a page follows the edits of its source", async (context) => {
      const { previewUrl } = await session.exposePort(PORT);
      assert.match(previewUrl, edge.url);
      const page = await browser.newPage();
      context.after(() => page.close());
      const failures = [];
      page.on("pageerror", (error) => failures.push(error.message));
      assert.equal((await page.goto(previewUrl)).status(), 502, "nothing listens yet");

      await develop(session, PORT, edge.environment);
      const sockets = listen(page);
      await eventually("the development server answers", async () => (await page.goto(previewUrl)).ok());
      const shows = (text) => page.waitForFunction((text) => document.querySelector("#message").textContent === text, text);
      await shows("first");
      const [navigation] = await page.evaluate(() => performance.getEntriesByType("navigation").map((entry) => entry.nextHopProtocol));
      assert.equal(navigation, edge.protocol);
      const socket = await eventually("the page is connected", () => sockets.find(({ messages }) => messages.some(({ type }) => type === "connected")));
      assert.equal(socket.url.host, new URL(previewUrl).host, "the WebSocket goes through the preview");
      assert.equal(socket.url.protocol, new URL(previewUrl).protocol.replace("http", "ws"));

      // A page that is loaded again has forgotten this.
      await page.evaluate(() => (window.kept = "since the beginning"));
      await edit(session, "src/message.js", 'export const message = "second";\n');
      await shows("second");
      // In another directory: Vite looks at each of them once in a second.
      await edit(session, "style/page.css", "#message { color: rgb(2, 2, 2); }\n");
      await page.waitForFunction(() => getComputedStyle(document.querySelector("#message")).color === "rgb(2, 2, 2)");
      assert.equal(await page.evaluate(() => window.kept), "since the beginning");
      assert.ok(socket.messages.filter(({ type }) => type === "update").length >= 2);
      assert.ok(!socket.messages.some(({ type }) => type === "full-reload"));
      assert.equal(sockets.length, 1, "one WebSocket, which lasted");
      assert.deepEqual(failures, []);
    });

    test("a development server that was told of no host answers to this machine's only, and says which setting names others", async (context) => {
      await develop(session, OTHER_PORT, "");
      const { previewUrl } = await session.exposePort(OTHER_PORT);
      const page = await browser.newPage();
      context.after(() => page.close());
      const answer = await eventually("the development server answers", async () => {
        const response = await page.goto(previewUrl);
        return response.status() !== 502 && response;
      });
      assert.equal(answer.status(), edge.environment ? 403 : 200);
      if (edge.environment) assert.match(await answer.text(), /server\.allowedHosts/);
    });
  });
}
