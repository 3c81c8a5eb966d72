//! Owned messages where the client library expects borrowed views of messages.

use std::ops::Deref;

use buffa::view::{MessageView, OwnedView};
use buffa::{DecodeContext, DecodeError, Message, encoding::Tag};

/// A view that is the whole message.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Whole<M>(M);

impl<'a, M: Message> MessageView<'a> for Whole<M> {
    type Owned = M;

    fn decode_view(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        M::decode_from_slice(bytes).map(Self)
    }

    fn decode_view_with_ctx(bytes: &'a [u8], context: DecodeContext<'_>) -> Result<Self, DecodeError> {
        Self::decode_view_ctx(bytes, context)
    }

    fn merge_view_field(
        &mut self,
        tag: Tag,
        mut rest: &'a [u8],
        _before_tag: &'a [u8],
        context: DecodeContext<'_>,
    ) -> Result<&'a [u8], DecodeError> {
        self.0.merge_field(tag, &mut rest, context)?;
        Ok(rest)
    }

    fn to_owned_message(&self) -> Result<M, DecodeError> {
        Ok(self.0.clone())
    }
}

/// A message received on a stream; reads like the message itself.
pub struct Received<M: Message> {
    message: M,
    view: OwnedView<Whole<M>>,
}

impl<M: Message> From<OwnedView<Whole<M>>> for Received<M> {
    fn from(view: OwnedView<Whole<M>>) -> Self {
        Self { message: view.to_owned_message(), view }
    }
}

impl<M: Message> AsRef<OwnedView<Whole<M>>> for Received<M> {
    fn as_ref(&self) -> &OwnedView<Whole<M>> {
        &self.view
    }
}

impl<M: Message> Deref for Received<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.message
    }
}
