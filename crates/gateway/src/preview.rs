//! Requests to previews, on their way to services in sandboxes and back.
