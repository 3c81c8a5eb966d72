// Files through the official SDK.

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { describe, test } from "node:test";
import {
  FileNotFoundError, InvalidStateError, PermissionDeniedError, QuotaExceededError, SandboxError,
} from "@tenkicloud/sandbox";
import { useSandbox } from "./lib/fixtures.mjs";
import { SMALL, bytes, readAll, rejection, shell, streamOf, text, unique } from "./lib/helpers.mjs";

let server;
let tenki;
let session;
useSandbox((made) => ({ server, tenki, session } = made));

const sha256 = (content) => createHash("sha256").update(content).digest("hex");
const names = (entries) => entries.map(({ path }) => path);

describe("whole files", () => {
  test("text and bytes come back as they were written", async () => {
    const every = Uint8Array.from({ length: 256 }, (_, index) => index);
    for (const content of [bytes("hello 長屋\n"), every, new Uint8Array(), randomBytes(3_000_000)]) {
      await session.writeFile("/tmp/content", content);
      const read = await session.readFile("/tmp/content");
      assert.equal(read.constructor, Uint8Array);
      assert.equal(sha256(read), sha256(content));
    }
    await session.writeFile("/tmp/content", "a string");
    assert.equal(text(await session.readFile("/tmp/content")), "a string");
  });

  test("relative paths are under home; /workspace and /tmp are there", async () => {
    await session.writeFile("relative.txt", "home");
    assert.equal(await shell(session, "cat /home/tenki/relative.txt"), "home");
    assert.equal(text(await session.readFile("./././relative.txt")), "home");
    for (const path of ["/workspace/file.txt", "/tmp/file.txt", "/home/tenki/file.txt"]) {
      await session.writeFile(path, path);
      assert.equal(await shell(session, `cat ${path}`), path);
      await shell(session, `echo more >> ${path}`);
      assert.equal(text(await session.readFile(path)), `${path}more\n`);
    }
  });

  test("new files belong to tenki and are readable by all", async () => {
    await session.writeFile("mine.txt", "x");
    assert.equal(await shell(session, "stat -c %U:%G:%a mine.txt"), "tenki:tenki:644");
  });

  test("writing replaces the content and keeps the mode", async () => {
    await session.writeFile("script.sh", "#!/bin/sh\necho a long first version of this script\n");
    await shell(session, "chmod 755 script.sh");
    await session.writeFile("script.sh", "#!/bin/sh\necho second\n");
    assert.equal(await shell(session, "./script.sh; stat -c %a script.sh"), "second\n755");
  });

  test("a link is written through, not replaced", async () => {
    await shell(session, "echo old > target && ln -sf target link");
    await session.writeFile("link", "new");
    assert.equal(await shell(session, "cat target; readlink link"), "newtarget");
  });

  test("the running kernel's files can be read although they have no size", async () => {
    assert.match(text(await session.readFile("/proc/filesystems")), /nodev/);
    await assert.rejects(session.readFile("/proc/self/maps"), PermissionDeniedError);
  });

  test("a file larger than a message is refused with a hint at the stream", async () => {
    await shell(session, "truncate -s 200M /tmp/large");
    const error = await rejection(session.readFile("/tmp/large"), QuotaExceededError);
    assert.match(error.message, /stream/i);
  });
});

describe("what goes wrong", () => {
  test("missing files are FileNotFound, whatever words their paths hold", async () => {
    for (const path of [
      "missing", "/no/such/directory/file", "templates/x", "snapshot/volume/artifact", "session", "registry image",
      "mine.txt-not/below", "git failed (exit_code=1)", "ssh",
    ]) {
      await rejection(session.readFile(path), FileNotFoundError);
      await rejection(session.stat(path), FileNotFoundError);
      await rejection(session.list(path), FileNotFoundError);
      await rejection(readAll(await session.readFileStream(path)), FileNotFoundError);
    }
  });

  test("writing makes the directories that are missing", async () => {
    await session.writeFile("no/such/template/directory/file", "one");
    assert.equal(text(await session.readFile("no/such/template/directory/file")), "one");
    await session.writeFileStream("no/such/volume/file", streamOf(bytes("two")));
    assert.equal(text(await session.readFile("no/such/volume/file")), "two");
    assert.equal(await shell(session, "stat -c %U:%a no/such/volume"), "tenki:755");
  });

  test("a directory is no file and a file is no directory", async () => {
    await session.mkdir("a-directory");
    await session.writeFile("a-file", "x");
    for (const attempt of [
      () => session.readFile("a-directory"),
      () => session.writeFile("a-directory", "x"),
      () => session.list("a-file"),
      () => session.writeFileStream("a-directory", streamOf(bytes("x"))),
    ]) {
      await rejection(attempt(), InvalidStateError);
    }
    await rejection(readAll(await session.readFileStream("a-directory")), InvalidStateError);
    await shell(session, "test -d a-directory && test -f a-file");
  });

  test("pipes and devices are refused at once instead of waiting", async () => {
    await shell(session, "mkfifo -m 666 /tmp/pipe");
    for (const path of ["/tmp/pipe", "/dev/null", "/dev/zero"]) {
      await rejection(session.readFile(path), InvalidStateError);
      await rejection(session.writeFile(path, "x"), InvalidStateError);
    }
  });

  test("the kernel's refusal is permission denied", async () => {
    await rejection(session.writeFile("/proc/version", "x"), PermissionDeniedError);
  });

  test("empty paths, NUL bytes and endless paths are invalid arguments", async () => {
    for (const path of ["", "a\0b", "x/".repeat(3_000)]) {
      for (const attempt of [
        () => session.readFile(path), () => session.writeFile(path, ""), () => session.stat(path),
        () => session.mkdir(path), () => session.remove(path), () => session.list(path),
        () => session.writeFileStream(path, streamOf(bytes("x"))), () => session.readFileStream(path).then(readAll),
      ]) {
        const error = await rejection(attempt(), SandboxError);
        assert.equal(error.cause.code, 3, `${JSON.stringify(path.slice(0, 10))}: ${error.message}`);
      }
    }
  });

  test("a full disk refuses the write, keeps what was there, and recovers", async () => {
    const machine = await tenki.create({ ...SMALL, diskSizeGb: 5 });
    try {
      await machine.writeFile("keep.txt", "the old content");
      await machine.exec("/bin/sh", { args: ["-c", "for size in 1G 64M 1M 4K; do i=0; while fallocate -l $size fill-$size-$i; do i=$((i+1)); done; rm -f fill-$size-$i; done"] });
      assert.equal((await machine.exec("/bin/sh", { args: ["-c", "head -c 1000000 /dev/zero > more"] })).exitCode, 1);
      await rejection(machine.writeFile("keep.txt", new Uint8Array(2_000_000)), QuotaExceededError);
      assert.equal(text(await machine.readFile("keep.txt")), "the old content");
      await shell(machine, "rm -f fill-* more");
      await machine.writeFile("keep.txt", new Uint8Array(2_000_000));
      assert.equal((await machine.stat("keep.txt")).size, 2_000_000n);
    } finally {
      await machine.close();
    }
  });
});

describe("stat, mkdir, remove, list", () => {
  test("stat tells size, kind, mode and time", async () => {
    await session.writeFile("/tmp/stat.txt", "12345");
    const started = BigInt(Date.now() - 3_600_000) * 1_000_000n;
    const file = await session.fs.stat("/tmp/stat.txt");
    assert.deepEqual([file.path, file.size, file.isDir, file.isSymlink, file.mode & 0o777], ["/tmp/stat.txt", 5n, false, false, 0o644]);
    assert.ok(file.modifiedUnixNs > started);
    const directory = await session.stat("/tmp");
    assert.deepEqual([directory.isDir, directory.mode & 0o7777], [true, 0o1777]);
    await shell(session, "ln -sf /no/where /tmp/dangling");
    const link = await session.stat("/tmp/dangling");
    assert.deepEqual([link.isSymlink, link.symlinkTarget, link.isDir], [true, "/no/where", false]);
  });

  test("mkdir makes parents, and an existing directory is fine", async () => {
    await session.fs.mkdir("made/by/sdk");
    await session.mkdir("made/by/sdk");
    assert.equal(await shell(session, "stat -c %U:%a made/by/sdk"), "tenki:755");
    await session.writeFile("made/file", "x");
    const error = await session.mkdir("made/file").then(() => assert.fail("made"), (reason) => reason);
    assert.ok([6, 9].includes(error.cause.code), error.message);
  });

  test("remove takes whole trees, files and links, never what a link points to", async () => {
    await shell(session, "mkdir -p tree/a/b outside && touch tree/1 tree/a/2 tree/a/b/.3 outside/kept && ln -s ../../outside tree/a/link");
    await session.remove("tree");
    assert.equal(await shell(session, "ls -A . | grep -c ^tree || true; ls outside"), "0\nkept");
    await shell(session, "ln -s outside a-link");
    await session.fs.remove("a-link");
    assert.equal(await shell(session, "ls outside"), "kept");
    await session.remove("never/was");
  });

  test("list is sorted, hides dot files unless asked, and tells kind and size", async () => {
    await shell(session, "mkdir -p listed/sub && printf 123 > listed/b && : > listed/.hidden && ln -s b listed/a");
    const entries = await session.fs.list("listed");
    assert.deepEqual(names(entries), ["a", "b", "sub"]);
    assert.deepEqual(names(await session.list("listed", { includeHidden: true })), [".hidden", "a", "b", "sub"]);
    const [, file, directory] = entries;
    assert.deepEqual([file.size, file.isDir, directory.isDir], [3n, false, true]);
    assert.deepEqual(await session.list("listed/sub"), []);
  });

  test("a thousand entries are listed", async () => {
    await shell(session, "mkdir many && cd many && for i in $(seq 1000 1999); do : > file-$i; done");
    const entries = await session.list("many");
    assert.deepEqual(names(entries), Array.from({ length: 1000 }, (_, index) => `file-${1000 + index}`));
  });

  test("awkward names survive", async () => {
    const name = "  spaces 'quotes\" \\ $HOME * 長屋 \n newline";
    await session.mkdir("awkward");
    await session.writeFile(`awkward/${name}`, "x");
    assert.deepEqual(names(await session.list("awkward")), [name]);
    await session.remove(`awkward/${name}`);
    assert.deepEqual(await session.list("awkward"), []);
  });
});

describe("streams", () => {
  test("fifty megabytes go in and out unchanged", async () => {
    const content = randomBytes(50_000_000);
    const pieces = [];
    for (let offset = 0; offset < content.length; offset += 1_000_000) pieces.push(content.subarray(offset, offset + 1_000_000));
    await session.fs.writeStream("/tmp/fifty", streamOf(...pieces));
    assert.equal(await shell(session, "sha256sum < /tmp/fifty"), `${sha256(content)}  -`);
    const read = await readAll(await session.fs.readStream("/tmp/fifty"));
    assert.equal(read.length, content.length);
    assert.equal(sha256(read), sha256(content));
  });

  test("a part is read with offset, length and chunk size", async () => {
    await session.writeFile("/tmp/part", "0123456789");
    const read = async (options) => String(await readAll(await session.readFileStream("/tmp/part", options)));
    assert.equal(await read({}), "0123456789");
    assert.equal(await read({ offset: 4 }), "456789");
    assert.equal(await read({ offset: 4n, length: 3n }), "456");
    assert.equal(await read({ offset: 8, length: 100 }), "89");
    assert.equal(await read({ offset: 100 }), "");
    const chunks = [];
    for await (const chunk of await session.readFileStream("/tmp/part", { chunkBytes: 4 })) chunks.push(text(chunk));
    assert.ok(chunks.every((chunk) => chunk.length <= 4) && chunks.join("") === "0123456789", JSON.stringify(chunks));
  });

  test("a negative offset is an invalid argument", async () => {
    const stream = await session.readFileStream("/tmp/part", { offset: -1 });
    assert.equal((await rejection(readAll(stream), SandboxError)).cause.code, 3);
  });

  test("an empty stream makes an empty file", async () => {
    await session.writeFileStream("/tmp/empty-stream", streamOf());
    assert.equal((await session.stat("/tmp/empty-stream")).size, 0n);
    assert.equal((await readAll(await session.readFileStream("/tmp/empty-stream"))).length, 0);
  });

  test("mode, truncate and sync are honoured", async () => {
    const path = unique("/tmp/options");
    await session.writeFileStream(path, streamOf(bytes("0123456789")), { mode: 0o600, sync: true });
    assert.equal(await shell(session, `stat -c %a ${path}`), "600");
    await session.writeFileStream(path, streamOf(bytes("ab"), bytes("c")), { truncate: false });
    assert.equal(text(await session.readFile(path)), "abc3456789");
    await session.writeFileStream(path, streamOf(bytes("xy")));
    assert.equal(text(await session.readFile(path)), "xy");
  });

  test("a stream that breaks off leaves nothing behind and changes nothing", async () => {
    await session.mkdir("broken");
    await session.writeFile("broken/old", "old content");
    for (const path of ["broken/old", "broken/new"]) {
      let pulls = 0;
      const source = new ReadableStream({
        pull(controller) {
          if (pulls++ < 5) controller.enqueue(new Uint8Array(200_000));
          else controller.error(new Error("the source broke"));
        },
      });
      await assert.rejects(session.writeFileStream(path, source), /the source broke/);
    }
    assert.equal(text(await session.readFile("broken/old")), "old content");
    // Also what the guest may have used on the way must be gone, at the latest in a moment.
    let left;
    for (let attempt = 0; attempt < 400; attempt++) {
      left = names(await session.list("broken", { includeHidden: true }));
      if (left.length === 1) break;
    }
    assert.deepEqual(left, ["old"]);
  });

  test("a reader that stops in the middle harms nobody", async () => {
    const reader = (await session.readFileStream("/tmp/fifty")).getReader();
    await reader.read();
    await reader.cancel();
    assert.equal(await shell(session, "echo fine"), "fine");
  });

  test("many files at once", async () => {
    const contents = Array.from({ length: 30 }, () => randomBytes(100_000));
    await Promise.all(contents.map((content, index) => session.writeFile(`/tmp/many-${index}`, content)));
    const read = await Promise.all(contents.map((_, index) => session.readFile(`/tmp/many-${index}`)));
    assert.deepEqual(read.map(sha256), contents.map(sha256));
  });
});
