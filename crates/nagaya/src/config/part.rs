//! A file whose keys belong to several structs.
//!
//! `#[serde(flatten)]` would do it too, but then nobody refuses unknown keys, and errors lose their place in the file.

use std::fmt;

use serde::de::value::Error as NoValue;
use serde::de::{DeserializeOwned, DeserializeSeed, Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, forward_to_deserialize_any};
use toml::Spanned;
use toml::de::{DeTable, Deserializer as Reader};

/// The keys of a struct in a file, as its `Deserialize` asks for them.
pub fn keys<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut keys: &'static [&'static str] = &[];
    // Ends with an error when it has asked: there is nothing to read.
    let _ = T::deserialize(Asked(&mut keys));
    keys
}

/// Reads one struct, and takes its keys out of the file.
pub fn take<T: DeserializeOwned>(file: &mut DeTable<'_>) -> Result<T, toml::de::Error> {
    let entries = keys::<T>().iter().filter_map(|key| file.remove_entry(*key));
    let part: DeTable<'_> = entries.collect();
    T::deserialize(Reader::from(Spanned::new(0..0, part)))
}

/// Refuses what no struct has taken.
pub fn refuse_rest(file: DeTable<'_>, known: &[&str]) -> Result<(), toml::de::Error> {
    Reader::from(Spanned::new(0..0, file)).deserialize_map(Nothing(known))
}

struct Asked<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Asked<'_> {
    type Error = NoValue;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, NoValue> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, NoValue> {
        Err(NoValue::custom("only asked for keys"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// A table without keys. The error about one gets its place in the file from whoever reads the key.
struct Nothing<'a>(&'a [&'a str]);

impl<'de> Visitor<'de> for Nothing<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("known keys")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        map.next_key_seed(self).map(drop)
    }
}

impl<'de> DeserializeSeed<'de> for Nothing<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let key = String::deserialize(deserializer)?;
        let known: Vec<String> = self.0.iter().map(|known| format!("`{known}`")).collect();
        Err(D::Error::custom(format_args!("unknown field `{key}`, expected one of {}", known.join(", "))))
    }
}
