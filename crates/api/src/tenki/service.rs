//! The macro that turns the generated table of rpcs into a service trait and a client.

use connectrpc::ConnectError;

use crate::error::{Code, Error};

/// The answer of every rpc that an implementation left out.
pub(crate) fn not_implemented(rpc: &str) -> ConnectError {
    Error::new(Code::Unimplemented, rpc).into()
}

/// Declares the trait, its registration with a [`connectrpc::Router`], and the client of one service.
macro_rules! service {
    (
        $(#[$service_doc:meta])*
        $service:ident, $client:ident, $full_name:literal;
        $($(#[$doc:meta])* $kind:ident $method:ident $rpc:literal $request:ident $response:ident;)*
    ) => {
        $(#[$service_doc])*
        ///
        /// Methods without a body of their own answer `unimplemented`.
        pub trait $service: Send + Sync + 'static {
            /// Adds all rpcs of this service to a router.
            fn register(self: ::std::sync::Arc<Self>, router: ::connectrpc::Router) -> ::connectrpc::Router
            where
                Self: Sized,
            {
                $(let router = $crate::tenki::service::route!(
                    $kind, router, self, $full_name, $rpc, Self::$method, $request, $response
                );)*
                router
            }

            $($crate::tenki::service::method! { $(#[$doc])* $kind $method $rpc $request $response })*
        }

        $(#[$service_doc])*
        ///
        /// Deadlines and headers (such as `authorization`) come from the client's configuration.
        #[cfg(feature = "client")]
        #[derive(Clone)]
        pub struct $client<T> {
            transport: T,
            config: ::connectrpc::client::ClientConfig,
        }

        #[cfg(feature = "client")]
        impl<T> $client<T>
        where
            T: ::connectrpc::client::ClientTransport,
            <T::ResponseBody as ::connectrpc::http_body::Body>::Error: ::std::fmt::Display,
        {
            pub fn new(transport: T, config: ::connectrpc::client::ClientConfig) -> Self {
                Self { transport, config }
            }

            $($crate::tenki::service::call! {
                $(#[$doc])* $kind $method concat!("/", $full_name, "/", $rpc), $request $response
            })*
        }

        $($crate::tenki::service::received! { $kind $response })*
    };
}

/// One method of a service trait.
macro_rules! method {
    ($(#[$doc:meta])* unary $method:ident $rpc:literal $request:ident $response:ident) => {
        $(#[$doc])*
        fn $method(
            &self,
            context: ::connectrpc::RequestContext,
            request: $request,
        ) -> impl Future<Output = ::connectrpc::ServiceResult<$response>> + Send {
            let _ = (context, request);
            ::std::future::ready(Err($crate::tenki::service::not_implemented($rpc)))
        }
    };
    ($(#[$doc:meta])* server_stream $method:ident $rpc:literal $request:ident $response:ident) => {
        $(#[$doc])*
        fn $method(
            &self,
            context: ::connectrpc::RequestContext,
            request: $request,
        ) -> impl Future<Output = ::connectrpc::ServiceResult<::connectrpc::ServiceStream<$response>>> + Send {
            let _ = (context, request);
            ::std::future::ready(Err($crate::tenki::service::not_implemented($rpc)))
        }
    };
    ($(#[$doc:meta])* client_stream $method:ident $rpc:literal $request:ident $response:ident) => {
        $(#[$doc])*
        fn $method(
            &self,
            context: ::connectrpc::RequestContext,
            requests: ::connectrpc::ServiceStream<$request>,
        ) -> impl Future<Output = ::connectrpc::ServiceResult<$response>> + Send {
            let _ = (context, requests);
            ::std::future::ready(Err($crate::tenki::service::not_implemented($rpc)))
        }
    };
    ($(#[$doc:meta])* bidi $method:ident $rpc:literal $request:ident $response:ident) => {
        $(#[$doc])*
        fn $method(
            &self,
            context: ::connectrpc::RequestContext,
            requests: ::connectrpc::ServiceStream<$request>,
        ) -> impl Future<Output = ::connectrpc::ServiceResult<::connectrpc::ServiceStream<$response>>> + Send {
            let _ = (context, requests);
            ::std::future::ready(Err($crate::tenki::service::not_implemented($rpc)))
        }
    };
}

/// The registration of one method.
macro_rules! route {
    (unary, $($rest:tt)*) => {
        $crate::tenki::service::route!(@ route, handler_fn, Unary, $($rest)*)
    };
    (server_stream, $($rest:tt)*) => {
        $crate::tenki::service::route!(@ route_server_stream, streaming_handler_fn, ServerStream, $($rest)*)
    };
    (client_stream, $($rest:tt)*) => {
        $crate::tenki::service::route!(@ route_client_stream, client_streaming_handler_fn, ClientStream, $($rest)*)
    };
    (bidi, $($rest:tt)*) => {
        $crate::tenki::service::route!(@ route_bidi_stream, bidi_streaming_handler_fn, BidiStream, $($rest)*)
    };
    (
        @ $route:ident, $handler:ident, $stream_type:ident,
        $router:ident, $service:ident, $full_name:literal, $rpc:literal, $method:path, $request:ident, $response:ident
    ) => {{
        let service = ::std::sync::Arc::clone(&$service);
        $router
            .$route::<_, $request, $response>(
                $full_name,
                $rpc,
                ::connectrpc::$handler(move |context, request| {
                    let service = ::std::sync::Arc::clone(&service);
                    async move { $method(&service, context, request).await }
                }),
            )
            .with_spec(::connectrpc::Spec::server(
                concat!("/", $full_name, "/", $rpc),
                ::connectrpc::StreamType::$stream_type,
            ))
    }};
}

/// One method of a client.
#[cfg(feature = "client")]
macro_rules! call {
    ($(#[$doc:meta])* unary $method:ident $path:expr, $request:ident $response:ident) => {
        $(#[$doc])*
        pub async fn $method(&self, request: $request) -> Result<$response, ::connectrpc::ConnectError> {
            let spec = ::connectrpc::Spec::client($path, ::connectrpc::StreamType::Unary);
            let options = ::connectrpc::client::CallOptions::default();
            let answer = ::connectrpc::client::call_unary::<_, _, $crate::tenki::client::Whole<$response>>(
                &self.transport, &self.config, spec, request, options,
            );
            Ok(answer.await?.into_owned())
        }
    };
    ($(#[$doc:meta])* server_stream $method:ident $path:expr, $request:ident $response:ident) => {
        $(#[$doc])*
        pub async fn $method(
            &self,
            request: $request,
        ) -> Result<
            ::connectrpc::client::ServerStream<T::ResponseBody, $crate::tenki::client::Whole<$response>>,
            ::connectrpc::ConnectError,
        > {
            let spec = ::connectrpc::Spec::client($path, ::connectrpc::StreamType::ServerStream);
            let options = ::connectrpc::client::CallOptions::default();
            ::connectrpc::client::call_server_stream(&self.transport, &self.config, spec, request, options).await
        }
    };
    ($(#[$doc:meta])* client_stream $method:ident $path:expr, $request:ident $response:ident) => {
        $(#[$doc])*
        pub async fn $method(
            &self,
            requests: impl ::connectrpc::client::ClientRequestStream<$request>,
        ) -> Result<$response, ::connectrpc::ConnectError> {
            let spec = ::connectrpc::Spec::client($path, ::connectrpc::StreamType::ClientStream);
            let options = ::connectrpc::client::CallOptions::default();
            let answer = ::connectrpc::client::call_client_stream::<_, _, $crate::tenki::client::Whole<$response>>(
                &self.transport, &self.config, spec, requests, options,
            );
            Ok(answer.await?.into_owned())
        }
    };
    ($(#[$doc:meta])* bidi $method:ident $path:expr, $request:ident $response:ident) => {
        $(#[$doc])*
        pub async fn $method(
            &self,
        ) -> Result<
            ::connectrpc::client::BidiStream<
                T::ResponseBody,
                $request,
                $crate::tenki::client::Whole<$response>,
            >,
            ::connectrpc::ConnectError,
        > {
            let spec = ::connectrpc::Spec::client($path, ::connectrpc::StreamType::BidiStream);
            let options = ::connectrpc::client::CallOptions::default();
            ::connectrpc::client::call_bidi_stream(&self.transport, &self.config, spec, options).await
        }
    };
}

/// What lets a client receive this message on a stream.
macro_rules! received {
    (unary $response:ident) => {};
    (client_stream $response:ident) => {};
    ($kind:ident $response:ident) => {
        #[cfg(feature = "client")]
        impl ::connectrpc::HasMessageView for $response {
            type View<'a> = $crate::tenki::client::Whole<Self>;
            type ViewHandle = $crate::tenki::client::Received<Self>;
        }
    };
}

#[cfg(feature = "client")]
pub(crate) use call;
pub(crate) use {method, received, route, service};
