//! A file server for SFTP, version 3, over standard input and output.
//!
//! It is started like a command, as the user whose files it serves, so that what the user may do is the kernel's
//! decision alone. It works in every image because it is a part of the agent's program. The version is the one that
//! every client speaks, with the extensions of OpenSSH (PROTOCOL, section 4) that clients profit from.

mod attributes;
mod extended;
mod handles;
mod listing;
mod requests;
mod wire;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;

use handles::Handles;
use wire::{Reply, Request};

/// Largest packet that is accepted, bytes; also what clients are told. OpenSSH has the same.
const PACKET_BYTES_MAX: usize = 256 * 1024;
/// Largest piece of a file in one packet, which has some 30 bytes beside it.
const DATA_BYTES_MAX: usize = PACKET_BYTES_MAX - 1024;
/// Answers that are collected while requests wait to be answered, bytes.
const ANSWERS_BYTES_MAX: usize = PACKET_BYTES_MAX;

/// What one connection has open.
#[derive(Default)]
struct Server {
    handles: Handles,
}

/// Serves standard input and output. The error is for the log of whoever started it.
pub fn main() -> Result<(), String> {
    // Not the standard library's, which has a buffer of its own.
    let file = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from).map_err(|error| format!("start: {error}"));
    serve(file(rustix::stdio::stdin())?, file(rustix::stdio::stdout())?)
}

/// Serves one client until it ends. What its requests do to files is done with the rights of this process.
pub fn serve(mut requests: impl Read, mut client: impl Write) -> Result<(), String> {
    let mut server = Server::default();
    let mut input = Input { bytes: vec![0; PACKET_BYTES_MAX + 4], start: 0, end: 0 };
    let mut answers = Vec::with_capacity(ANSWERS_BYTES_MAX + PACKET_BYTES_MAX);
    loop {
        while let Some(packet) = input.packet()? {
            server.answer(packet, &mut answers);
            if answers.len() >= ANSWERS_BYTES_MAX {
                flush(&mut client, &mut answers)?;
            }
        }
        flush(&mut client, &mut answers)?;
        if !input.fill(&mut requests)? {
            return Ok(());
        }
    }
}

/// What was read and not yet answered.
struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    /// The next packet without its length, if it is there as a whole.
    fn packet(&mut self) -> Result<Option<&[u8]>, String> {
        let Some((length, _)) = self.bytes[self.start..self.end].split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length == 0 || length > PACKET_BYTES_MAX {
            return Err(format!("a packet of {length} bytes"));
        }
        if self.end - self.start < 4 + length {
            return Ok(None);
        }
        let packet = self.start + 4..self.start + 4 + length;
        self.start = packet.end;
        Ok(Some(&self.bytes[packet]))
    }

    /// Reads more; false at the end.
    fn fill(&mut self, requests: &mut impl Read) -> Result<bool, String> {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            match requests.read(&mut self.bytes[self.end..]) {
                Ok(0) => return Ok(false),
                Ok(read) => {
                    self.end += read;
                    return Ok(true);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("read: {error}")),
            }
        }
    }
}

fn flush(client: &mut impl Write, answers: &mut Vec<u8>) -> Result<(), String> {
    client.write_all(answers).map_err(|error| format!("write: {error}"))?;
    answers.clear();
    Ok(())
}

impl Server {
    /// Answers one packet. Whatever is in it, there is one answer; only what is too short for an id has none.
    fn answer(&mut self, packet: &[u8], answers: &mut Vec<u8>) {
        let mut reply = Reply::begin(answers);
        let Some((kind, mut request)) = Request::parse(packet) else { return reply.abandon() };
        if kind == wire::INIT {
            return requests::version(reply);
        }
        let Ok(id) = request.number() else { return reply.abandon() };
        reply.set_id(id);
        if let Err(failure) = self.serve(kind, &mut request, &mut reply) {
            reply.restart(id);
            reply.status(failure);
        }
        reply.finish();
    }
}

#[cfg(test)]
mod tests;
