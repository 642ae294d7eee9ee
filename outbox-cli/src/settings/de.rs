//! Gives the configuration its meaning: a [`Node`] as serde reads it, with errors that name the place.

use std::fmt;

use serde::de::value::{MapAccessDeserializer, StringDeserializer};
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, Expected, IntoDeserializer,
    MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::tree::{Node, Origin, Value};

/// What is wrong with a value.
#[derive(Debug)]
pub(super) struct Problem {
    /// The names that lead to it, outermost first.
    pub(super) path: Vec<String>,
    pub(super) origin: Origin,
    pub(super) text: String,
    /// The value, which is not shown where secrets may be.
    pub(super) value: Option<String>,
}

/// Reads a value of type `T`.
pub(super) fn read<T: DeserializeOwned>(node: Node) -> Result<T, Problem> {
    T::deserialize(Reader(node))
}

struct Reader(Node);

impl<'de> Deserializer<'de> for Reader {
    type Error = Problem;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        let Node { value, origin } = self.0;
        let read = match value {
            Value::Text(text) | Value::Raw(text) => visitor.visit_string(text),
            Value::Integer(value) => visitor.visit_i64(value),
            Value::Float(value) => visitor.visit_f64(value),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::List(items) => visitor.visit_seq(Items(items.into_iter())),
            Value::Table(entries) => visitor.visit_map(Entries {
                rest: entries.into_iter(),
                next: None,
            }),
        };
        read.map_err(|problem: Problem| problem.at(origin))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Problem> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Problem> {
        let Node { value, origin } = self.0;
        match value {
            Value::Text(text) | Value::Raw(text) => visitor.visit_enum(Variant(text)),
            other => MapAccessDeserializer::new(Entries {
                rest: other.into_entries().into_iter(),
                next: None,
            })
            .deserialize_enum(name, variants, visitor),
        }
        .map_err(|problem: Problem| problem.at(origin))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.parsed(Value::Bool).deserialize_any(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.parsed(Value::Float).deserialize_any(visitor)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.parsed(Value::Integer).deserialize_any(visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_i64(visitor)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u8 u128 f32 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct
        identifier ignored_any
    }
}

impl Reader {
    /// A value of the environment as what is wanted, if it can be that; the visitor complains otherwise.
    fn parsed<T: std::str::FromStr>(mut self, make: impl Fn(T) -> Value) -> Self {
        if let Value::Raw(text) = &self.0.value
            && let Ok(value) = text.trim().parse()
        {
            self.0.value = make(value);
        }
        self
    }
}

impl Value {
    fn into_entries(self) -> std::collections::BTreeMap<String, Node> {
        match self {
            Self::Table(entries) => entries,
            _ => std::collections::BTreeMap::new(),
        }
    }
}

/// A table's entries.
struct Entries {
    rest: std::collections::btree_map::IntoIter<String, Node>,
    next: Option<(String, Node)>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = Problem;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Problem> {
        let Some((name, node)) = self.rest.next() else {
            return Ok(None);
        };
        let key: StringDeserializer<Problem> = name.clone().into_deserializer();
        let key = seed
            .deserialize(key)
            .map_err(|problem| problem.at(node.origin.clone()).within(&name))?;
        self.next = Some((name, node));
        Ok(Some(key))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Problem> {
        let Some((name, node)) = self.next.take() else {
            return Err(Problem::custom("a value was asked for before its key"));
        };
        let origin = node.origin.clone();
        seed.deserialize(Reader(node))
            .map_err(|problem| problem.at(origin).within(&name))
    }
}

struct Items(std::vec::IntoIter<Node>);

impl<'de> SeqAccess<'de> for Items {
    type Error = Problem;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Problem> {
        self.0
            .next()
            .map(|node| seed.deserialize(Reader(node)))
            .transpose()
    }
}

/// An enum's variant without fields, by its name.
struct Variant(String);

impl<'de> EnumAccess<'de> for Variant {
    type Error = Problem;
    type Variant = Unit;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Unit), Problem> {
        let name: StringDeserializer<Problem> = self.0.into_deserializer();
        Ok((seed.deserialize(name)?, Unit))
    }
}

struct Unit;

impl<'de> VariantAccess<'de> for Unit {
    type Error = Problem;

    fn unit_variant(self) -> Result<(), Problem> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Problem> {
        Err(Problem::custom("expected a table"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Problem> {
        Err(Problem::custom("expected a table"))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Problem> {
        Err(Problem::custom("expected a table"))
    }
}

impl Problem {
    /// Where it is, unless that is known more exactly already.
    fn at(mut self, origin: Origin) -> Self {
        if self.origin == Origin::None {
            self.origin = origin;
        }
        self
    }

    pub(super) fn within(mut self, name: &str) -> Self {
        self.path.insert(0, name.to_owned());
        self
    }
}

impl serde::de::Error for Problem {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self {
            path: Vec::new(),
            origin: Origin::None,
            text: text.to_string(),
            value: None,
        }
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let expected = match expected.to_string().as_str() {
            "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more".to_owned(),
            "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
            "a boolean" => "true or false".to_owned(),
            other => other.to_owned(),
        };
        let mut problem = Self::custom(format!("expected {expected}"));
        problem.value = match found {
            Unexpected::Str(text) => Some(format!("{text:?}")),
            Unexpected::Signed(value) => Some(value.to_string()),
            Unexpected::Unsigned(value) => Some(value.to_string()),
            Unexpected::Float(value) => Some(value.to_string()),
            Unexpected::Bool(value) => Some(value.to_string()),
            Unexpected::Map => Some("a table".to_owned()),
            Unexpected::Seq => Some("a list".to_owned()),
            _ => None,
        };
        problem
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Problem {}
