//! The task that reads frames: checks them against the rules and hands them to their streams. It
//! never waits for anything but the next bytes, since all that it hands on was granted before.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{Semaphore, mpsc};

use super::{CREDIT_MAX, Incoming, Request, Role, STREAMS_MAX, Shared, Slot, charge, insert};
use crate::frame::{Decoder, Frame, Kind};
use crate::writer;

pub(super) async fn read<R: AsyncRead + Unpin>(
    mut reader: R,
    mut decoder: Decoder,
    shared: Arc<Shared>,
    requests: mpsc::UnboundedSender<Request>,
) {
    let mut closed = shared.closed.subscribe();
    loop {
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => match accept(&shared, &requests, frame) {
                    Ok(()) => {}
                    Err(reason) => return shared.close(&reason),
                },
                Ok(None) => break,
                Err(error) => return shared.close(&error.to_string()),
            }
        }
        let buffer = decoder.buffer();
        tokio::select! {
            read = reader.read_buf(buffer) => match read {
                Ok(0) => return shared.close("the other side closed the connection"),
                Ok(bytes) => decoder.received(bytes),
                Err(error) => return shared.close(&format!("read: {error}")),
            },
            () = writer::ended(&mut closed) => return,
        }
    }
}

/// Handles one frame. An error is a violation of the protocol, in words.
fn accept(shared: &Arc<Shared>, requests: &mpsc::UnboundedSender<Request>, frame: Frame) -> Result<(), String> {
    let Frame { kind, stream, .. } = frame;
    match (kind, shared.role) {
        (Kind::Hello, _) => return Err("a second greeting".into()),
        (Kind::Goodbye, _) => {
            let reason: String = String::from_utf8_lossy(&frame.payload).chars().take(200).collect();
            return Err(format!("the other side left: {reason}"));
        }
        (Kind::Open, Role::Agent) => return open(shared, requests, frame),
        (Kind::Open, Role::Host) | (Kind::ErrorData, Role::Agent) => {
            return Err(format!("{kind:?} from the wrong side"));
        }
        _ => {}
    }
    if stream > shared.last.load(Ordering::Relaxed) {
        return Err(format!("{kind:?} on a stream that was never opened"));
    }
    let mut table = shared.table();
    let Some(entry) = table.entries.get_mut(&stream) else {
        return Ok(()); // The stream ended here while the frame was under way.
    };
    match kind {
        Kind::Window => {
            let (bytes, messages) = frame.granted().expect("the decoder checked the length");
            add_credit(&entry.slot.send_bytes, bytes)?;
            add_credit(&entry.slot.send_messages, messages)?;
        }
        Kind::Message => {
            take_credit(&entry.slot, 0, 1)?;
            let _ = entry.queue.send(Incoming::Message(frame.payload));
        }
        Kind::Data | Kind::ErrorData => {
            if entry.content_ended {
                return Err("content after its end".into());
            }
            take_credit(&entry.slot, charge(frame.payload.len()), 0)?;
            let data = if kind == Kind::Data { Incoming::Data } else { Incoming::ErrorData };
            let _ = entry.queue.send(data(frame.payload));
        }
        Kind::End if shared.role == Role::Agent => {
            if std::mem::replace(&mut entry.content_ended, true) {
                return Err("a second end".into());
            }
            let _ = entry.queue.send(Incoming::End(frame.payload));
        }
        Kind::End | Kind::Reset => {
            let entry = table.entries.remove(&stream).expect("just found");
            entry.slot.close();
            let _ = entry.queue.send(if kind == Kind::End { Incoming::End(frame.payload) } else { Incoming::Reset });
        }
        Kind::Hello | Kind::Open | Kind::Goodbye => unreachable!("handled above"),
    }
    Ok(())
}

fn open(shared: &Arc<Shared>, requests: &mpsc::UnboundedSender<Request>, frame: Frame) -> Result<(), String> {
    if frame.stream <= shared.last.load(Ordering::Relaxed) {
        return Err("a stream was opened twice".into());
    }
    let mut table = shared.table();
    if table.closed {
        return Ok(());
    }
    if table.entries.len() >= STREAMS_MAX {
        return Err("too many streams".into());
    }
    shared.last.store(frame.stream, Ordering::Relaxed);
    let (sender, receiver) = insert(shared, &mut table, frame.stream);
    drop(table);
    let _ = requests.send(Request { payload: frame.payload, sender, receiver });
    Ok(())
}

fn add_credit(credit: &Semaphore, more: u32) -> Result<(), String> {
    if credit.available_permits() + more as usize > CREDIT_MAX as usize {
        return Err("more credit than a stream may have".into());
    }
    credit.add_permits(more as usize);
    Ok(())
}

fn take_credit(slot: &Slot, bytes: u32, messages: u32) -> Result<(), String> {
    let mut granted = slot.granted.lock().expect("nothing panics while holding the credit");
    match (granted.0.checked_sub(bytes), granted.1.checked_sub(messages)) {
        (Some(bytes), Some(messages)) => {
            *granted = (bytes, messages);
            Ok(())
        }
        _ => Err("more was sent than had been granted".into()),
    }
}
