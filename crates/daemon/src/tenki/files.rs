//! File contents, as wholes and as streams. Content is passed on by reference; nothing here copies
//! it but the encoding as JSON.

use std::sync::Arc;

use buffa::encoding::encode_varint;
use bytes::{Bytes, BytesMut};
use connectrpc::{CodecFormat, ConnectError, Encodable, EncodedBody, EncodedStream, RequestContext, ServiceStream};
use futures::StreamExt;
use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::write_file_stream_request::Payload;
use nagaya_engine::OpenSession;
use nagaya_engine::ports::{FileReader, WriteOptions};
use tokio::sync::mpsc;

use super::messages;
use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::parse::{check_path, required};
use crate::rpc::service::held;
use crate::wire::body::is_framed;

/// The guest takes this much at once.
const WRITE_CHUNK_BYTES: usize = 64 * 1024;

/// Hands content to a guest in pieces of the size it takes. `Err` when it takes no more.
pub(super) async fn send(
    chunks: &mpsc::Sender<Bytes>,
    mut content: Bytes,
) -> Result<(), mpsc::error::SendError<Bytes>> {
    while !content.is_empty() {
        let chunk = content.split_to(content.len().min(WRITE_CHUNK_BYTES));
        chunks.send(chunk).await?;
    }
    Ok(())
}

/// Reads a whole file and gives the encoded answer.
pub(super) async fn read_file(
    tenki: &TenkiService,
    context: &RequestContext,
    request: Option<wire::ReadFileRequest>,
    format: CodecFormat,
) -> Result<EncodedBody, ConnectError> {
    let request = required(request, "request")?;
    check_path(&request.path)?;
    let open = tenki.open(context, &request.session_id).await?;
    let mut reader = open.guest.read_file(&request.path, 0, 0, 0).await.map_err(messages::guest_error)?;
    let bytes_max = tenki.message_bytes_max;
    // The size is checked again while reading: generated files say 0, and others may grow.
    let (mut chunks, mut bytes) = (Vec::new(), usize::try_from(reader.total_size).unwrap_or(usize::MAX));
    // Other forms than gRPC's own are put together out of the pieces, and JSON is longer than what it holds.
    let copies = match format {
        CodecFormat::Proto if is_framed(context.headers()) => 1,
        CodecFormat::Proto => 2,
        _ => 4,
    };
    let held = held(context)?;
    if bytes <= bytes_max {
        held.reserve(bytes * copies).await?;
        bytes = 0;
        while let Some(chunk) = reader.chunks.recv().await.transpose().map_err(messages::guest_error)? {
            bytes += chunk.len();
            if bytes > bytes_max {
                break;
            }
            held.grow(chunk.len() * copies).await?;
            chunks.push(chunk);
        }
    }
    if bytes > bytes_max {
        let detail =
            format!("the file is larger than message_bytes_max, {bytes_max} bytes; read it with ReadFileStream");
        return Err(Error::new(Code::MessageTooLarge, detail).into());
    }
    if format != CodecFormat::Proto {
        let content = EncodedBody::from_segments(chunks).into_contiguous();
        let response = wire::ReadFileResponse { path: request.path, content };
        let message = wire::SandboxSessionDataPlaneServiceReadFileResponse { response: response.into() };
        return message.encode_segments(format);
    }
    let mut fields = BytesMut::with_capacity(request.path.len() + 16);
    encode_varint(u64::from(READ_FILE_PATH << 3 | LENGTH_DELIMITED), &mut fields);
    encode_varint(request.path.len() as u64, &mut fields);
    fields.extend_from_slice(request.path.as_bytes());
    Ok(enclose(fields, READ_FILE_CONTENT, chunks))
}

pub(super) async fn write_file(
    tenki: &TenkiService,
    context: &RequestContext,
    request: Option<wire::WriteFileRequest>,
) -> Result<wire::WriteFileResponse, ConnectError> {
    let request = required(request, "request")?;
    check_path(&request.path)?;
    let open = tenki.open(context, &request.session_id).await?;
    let options = WriteOptions { mode: 0, truncate: true, sync: false };
    let writer = open.guest.write_file(&request.path, options).await.map_err(messages::guest_error)?;
    // A failed send means that writing failed; `finish` tells why.
    let _ = send(&writer.chunks, request.content).await;
    let written = writer.finish().await.map_err(messages::guest_error)?;
    Ok(wire::WriteFileResponse { path: request.path, size_bytes: convert::saturating(written) })
}

pub(super) async fn write_file_stream(
    tenki: &TenkiService,
    context: &RequestContext,
    mut requests: ServiceStream<wire::SandboxSessionDataPlaneServiceWriteFileStreamRequest>,
) -> Result<wire::WriteFileStreamResponse, ConnectError> {
    let protocol = |problem: &str| Error::new(Code::StreamProtocol, problem);
    let Some(first) = requests.next().await.transpose()? else {
        return Err(protocol("the stream ended before its start frame").into());
    };
    let Some(Payload::Start(start)) = required(first.frame.into_option(), "frame")?.payload else {
        return Err(protocol("the first frame is not start").into());
    };
    check_path(&start.path)?;
    let open = tenki.open(context, &start.session_id).await?;
    let options = WriteOptions { mode: start.mode, truncate: start.truncate, sync: start.sync };
    let writer = open.guest.write_file(&start.path, options).await.map_err(messages::guest_error)?;
    // Whatever ends this function early drops the writer, which leaves the file as it was.
    while let Some(message) = requests.next().await.transpose()? {
        let data = match required(message.frame.into_option(), "frame")?.payload {
            Some(Payload::Data(data)) => data,
            Some(Payload::Start(_)) => return Err(protocol("a second start frame").into()),
            None => continue,
        };
        // A failed send means that writing failed; `finish` tells why.
        if send(&writer.chunks, data).await.is_err() {
            break;
        }
    }
    let written = writer.finish().await.map_err(messages::guest_error)?;
    Ok(wire::WriteFileStreamResponse { bytes_written: convert::saturating(written), path: start.path })
}

/// Reads a file and gives its encoded messages.
pub(super) async fn read_file_stream(
    tenki: &Arc<TenkiService>,
    context: &RequestContext,
    request: Option<wire::ReadFileStreamRequest>,
    format: CodecFormat,
) -> Result<EncodedStream, ConnectError> {
    let request = required(request, "request")?;
    check_path(&request.path)?;
    let unsigned = |number: i64, field: &str| {
        u64::try_from(number).map_err(|_| Error::new(Code::InvalidArgument, format!("{field} must not be negative")))
    };
    let (offset, length) = (unsigned(request.offset, "offset")?, unsigned(request.length, "length")?);
    let message_bytes = match request.chunk_bytes {
        0 => tenki.read_chunk_bytes,
        asked => (asked as usize).min(tenki.read_chunk_bytes),
    };
    let open = tenki.open(context, &request.session_id).await?;
    // Messages are cut here, so that no client can make the guest work in tiny or huge pieces.
    let reader = open.guest.read_file(&request.path, offset, length, 0).await;
    let reading = Reading {
        reader: reader.map_err(messages::guest_error)?,
        message_bytes,
        rest: None,
        format,
        ended: false,
        _open: open,
    };
    Ok(Box::pin(futures::stream::unfold(reading, |mut reading| async move {
        let message = reading.next().await?;
        Some((message, reading))
    })))
}

struct Reading {
    reader: FileReader,
    /// Content of one message at most.
    message_bytes: usize,
    /// What did not fit into the last message.
    rest: Option<Bytes>,
    format: CodecFormat,
    ended: bool,
    /// Keeps the session in use.
    _open: OpenSession,
}

impl Reading {
    /// One message of what is there already: a fast reader gets large ones, a slow source is not
    /// waited for.
    async fn next(&mut self) -> Option<Result<EncodedBody, ConnectError>> {
        if self.ended {
            return None;
        }
        let first = match self.rest.take() {
            Some(rest) => Some(Ok(rest)),
            None => self.reader.chunks.recv().await,
        };
        let (mut chunks, mut bytes) = (Vec::with_capacity(8), 0);
        let mut chunk = first;
        loop {
            match chunk {
                Some(Ok(mut piece)) => {
                    let room = self.message_bytes - bytes;
                    if piece.len() > room {
                        self.rest = Some(piece.split_off(room));
                    }
                    bytes += piece.len();
                    chunks.push(piece);
                    if bytes == self.message_bytes {
                        break;
                    }
                }
                Some(Err(error)) => {
                    self.ended = true;
                    return Some(Err(messages::guest_error(error)));
                }
                None => {
                    self.ended = true;
                    break;
                }
            }
            chunk = match self.reader.chunks.try_recv() {
                Ok(next) => Some(next),
                Err(mpsc::error::TryRecvError::Disconnected) => None,
                Err(mpsc::error::TryRecvError::Empty) => break,
            };
        }
        Some(encode(chunks, self.ended, self.reader.total_size, self.format))
    }
}

/// Encodes `{response: {data, eof, total_size}}`.
fn encode(chunks: Vec<Bytes>, eof: bool, total_size: u64, format: CodecFormat) -> Result<EncodedBody, ConnectError> {
    if format != CodecFormat::Proto {
        let response = wire::ReadFileStreamResponse {
            data: EncodedBody::from_segments(chunks).into_contiguous(),
            eof,
            total_size: convert::saturating(total_size),
        };
        let message = wire::SandboxSessionDataPlaneServiceReadFileStreamResponse { response: response.into() };
        return message.encode_segments(format);
    }
    let mut fields = BytesMut::with_capacity(32);
    if eof {
        encode_varint(u64::from(READ_STREAM_EOF << 3), &mut fields);
        encode_varint(1, &mut fields);
    }
    if total_size > 0 {
        encode_varint(u64::from(READ_STREAM_TOTAL_SIZE << 3), &mut fields);
        encode_varint(total_size, &mut fields);
    }
    Ok(enclose(fields, READ_STREAM_DATA, chunks))
}

/// Encodes `{response: {fields…, content}}` with the content left where it is. It comes last, so
/// that everything else is one segment in front of it.
fn enclose(mut fields: BytesMut, content_field: u32, content: Vec<Bytes>) -> EncodedBody {
    let content_bytes: usize = content.iter().map(Bytes::len).sum();
    if content_bytes > 0 {
        encode_varint(u64::from(content_field << 3 | LENGTH_DELIMITED), &mut fields);
        encode_varint(content_bytes as u64, &mut fields);
    }
    let mut head = BytesMut::with_capacity(fields.len() + 12);
    encode_varint(u64::from(RESPONSE << 3 | LENGTH_DELIMITED), &mut head);
    encode_varint((fields.len() + content_bytes) as u64, &mut head);
    head.extend_from_slice(&fields);
    let mut segments = Vec::with_capacity(content.len() + 1);
    segments.push(head.freeze());
    segments.extend(content);
    EncodedBody::from_segments(segments)
}

/// Field numbers of the contract.
const RESPONSE: u32 = 1;
const READ_FILE_PATH: u32 = 1;
const READ_FILE_CONTENT: u32 = 2;
const READ_STREAM_DATA: u32 = 1;
const READ_STREAM_EOF: u32 = 2;
const READ_STREAM_TOTAL_SIZE: u32 = 3;
const LENGTH_DELIMITED: u32 = 2;

#[cfg(test)]
mod tests {
    use buffa::Message;

    use super::*;

    fn decode(body: EncodedBody) -> wire::ReadFileStreamResponse {
        wire::SandboxSessionDataPlaneServiceReadFileStreamResponse::decode_from_slice(&body.into_contiguous())
            .unwrap()
            .response
            .into_option()
            .unwrap()
    }

    #[test]
    fn messages_encoded_by_hand_read_like_generated_ones() {
        for (chunks, eof, total_size) in [
            (vec![], true, 0),
            (vec![], false, 0),
            (vec![Bytes::from_static(b"abc")], false, 3),
            (vec![Bytes::from(vec![1; 70_000]), Bytes::from(vec![2; 300])], true, u64::from(u32::MAX) + 1),
        ] {
            let data = chunks.concat();
            let response = decode(encode(chunks, eof, total_size, CodecFormat::Proto).unwrap());
            assert_eq!(response.data, data);
            assert_eq!(response.eof, eof);
            assert_eq!(response.total_size, convert::saturating(total_size));
        }
    }
}
