//! The dispatch of all rpcs. Those that carry file contents bypass the generated code, which would
//! copy the content on its way in and out.

use std::sync::Arc;

use buffa::Message;
use bytes::Bytes;
use connectrpc::dispatcher::{Dispatcher, MethodDescriptor, RequestStream, StreamingResult, UnaryResult};
use connectrpc::{CodecFormat, ConnectError, Encodable, Payload, RequestContext, Response, Router, ServiceStream};
use futures::StreamExt;
use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1 as wire;

use super::service::TenkiService;
use super::{files, services};

const READ_FILE: &str = "tenki.sandbox.v1.SandboxSessionDataPlaneService/ReadFile";
const WRITE_FILE: &str = "tenki.sandbox.v1.SandboxSessionDataPlaneService/WriteFile";
const READ_FILE_STREAM: &str = "tenki.sandbox.v1.SandboxSessionDataPlaneService/ReadFileStream";
pub(super) const WRITE_FILE_STREAM: &str = "tenki.sandbox.v1.SandboxSessionDataPlaneService/WriteFileStream";

pub(super) struct ZeroCopyDispatcher {
    router: Router,
    tenki: Arc<TenkiService>,
}

impl ZeroCopyDispatcher {
    pub(super) fn new(tenki: Arc<TenkiService>) -> Self {
        Self { router: services::router(&tenki), tenki }
    }
}

impl Dispatcher for ZeroCopyDispatcher {
    fn lookup(&self, path: &str) -> Option<MethodDescriptor> {
        self.router.lookup(path)
    }

    fn call_unary(&self, path: &str, context: RequestContext, request: Payload, format: CodecFormat) -> UnaryResult {
        let tenki = Arc::clone(&self.tenki);
        match path {
            READ_FILE => Box::pin(async move {
                let request: wire::SandboxSessionDataPlaneServiceReadFileRequest =
                    decode(request.encoded()?, &context, format)?;
                let body = files::read_file(&tenki, &context, request.request.into_option(), format).await?;
                Ok(Response::new(body))
            }),
            WRITE_FILE => Box::pin(async move {
                let request: wire::SandboxSessionDataPlaneServiceWriteFileRequest =
                    decode(request.encoded()?, &context, format)?;
                let response = files::write_file(&tenki, &context, request.request.into_option()).await?;
                let message = wire::SandboxSessionDataPlaneServiceWriteFileResponse { response: response.into() };
                Ok(Response::new(message.encode_segments(format)?))
            }),
            _ => self.router.call_unary(path, context, request, format),
        }
    }

    fn call_server_streaming(
        &self,
        path: &str,
        context: RequestContext,
        request: Bytes,
        format: CodecFormat,
    ) -> StreamingResult {
        if path != READ_FILE_STREAM {
            return self.router.call_server_streaming(path, context, request, format);
        }
        let tenki = Arc::clone(&self.tenki);
        Box::pin(async move {
            let request: wire::SandboxSessionDataPlaneServiceReadFileStreamRequest = decode(request, &context, format)?;
            let stream = files::read_file_stream(&tenki, &context, request.request.into_option(), format).await?;
            Ok(Response::new(stream))
        })
    }

    fn call_client_streaming(
        &self,
        path: &str,
        context: RequestContext,
        requests: RequestStream,
        format: CodecFormat,
    ) -> UnaryResult {
        if path != WRITE_FILE_STREAM {
            return self.router.call_client_streaming(path, context, requests, format);
        }
        let tenki = Arc::clone(&self.tenki);
        Box::pin(async move {
            let limits = context.clone();
            let requests: ServiceStream<_> = Box::pin(requests.map(move |request| decode(request?, &limits, format)));
            let response = files::write_file_stream(&tenki, &context, requests).await?;
            let message = wire::SandboxSessionDataPlaneServiceWriteFileStreamResponse { response: response.into() };
            Ok(Response::new(message.encode_segments(format)?))
        })
    }

    fn call_bidi_streaming(
        &self,
        path: &str,
        context: RequestContext,
        requests: RequestStream,
        format: CodecFormat,
    ) -> StreamingResult {
        self.router.call_bidi_streaming(path, context, requests, format)
    }
}

/// Decodes a message; contents in it stay parts of the given buffer.
fn decode<M: Message + serde::de::DeserializeOwned>(
    mut message: Bytes,
    context: &RequestContext,
    format: CodecFormat,
) -> Result<M, ConnectError> {
    let malformed =
        |problem: String| Error::new(Code::InvalidArgument, format!("the message cannot be read: {problem}"));
    Ok(match format {
        CodecFormat::Proto => {
            context.decode_options().decode(&mut message).map_err(|error| malformed(error.to_string()))?
        }
        _ => serde_json::from_slice(&message).map_err(|error| malformed(error.to_string()))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_not_copied_out_of_a_message() {
        let frame = wire::WriteFileStreamRequest {
            payload: Some(wire::write_file_stream_request::Payload::Data(Bytes::from(vec![7; 1000]))),
        };
        let message = wire::SandboxSessionDataPlaneServiceWriteFileStreamRequest { frame: frame.into() };
        let encoded = Bytes::from(message.encode_to_vec());
        let decoded: wire::SandboxSessionDataPlaneServiceWriteFileStreamRequest =
            decode(encoded.clone(), &RequestContext::new(Default::default()), CodecFormat::Proto).unwrap();
        let Some(wire::write_file_stream_request::Payload::Data(data)) = decoded.frame.into_option().unwrap().payload
        else {
            panic!("a data frame")
        };
        assert!(encoded.as_ptr_range().contains(&data.as_ptr()), "the data is a part of the message's buffer");
    }
}
