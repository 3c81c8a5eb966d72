//! What callers give: structs that may have more fields in a later version, and are built all the same.

/// A struct that others cannot name all fields of, with a method for each field, so that it is built in one expression:
/// `ForkOptions::default().count(3)`.
macro_rules! settable {
    (
        $(#[$attribute:meta])*
        pub struct $name:ident {
            $($(#[$field_attribute:meta])* pub $field:ident: $type:ty,)*
        }
    ) => {
        $(#[$attribute])*
        #[non_exhaustive]
        pub struct $name {
            $($(#[$field_attribute])* pub $field: $type,)*
        }

        impl $name {
            $(
                $(#[$field_attribute])*
                #[must_use]
                pub fn $field(mut self, $field: $type) -> Self {
                    self.$field = $field;
                    self
                }
            )*
        }
    };
}
pub(crate) use settable;
