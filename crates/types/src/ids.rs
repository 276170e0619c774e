//! Identifiers, parsed once at the edge.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a string is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Empty, or longer than the limit.
    #[error("{what} must have 1 to {max} characters, not {len}")]
    Length {
        /// Which identifier.
        what: &'static str,
        /// The limit in characters.
        max: usize,
        /// What was given.
        len: usize,
    },
    /// A character outside the allowed set.
    #[error(
        "{what} may hold letters, digits and . _ @ + - only, and starts with a letter or digit: found {found:?}"
    )]
    Character {
        /// Which identifier.
        what: &'static str,
        /// The first offending character.
        found: char,
    },
    /// Not the hexadecimal form of a 32-byte hash.
    #[error("a generation is 64 hexadecimal digits")]
    Generation,
}

fn check(what: &'static str, max: usize, text: &str) -> Result<(), IdError> {
    let len = text.chars().count();
    if len == 0 || len > max {
        return Err(IdError::Length { what, max, len });
    }
    let allowed = |(at, c): (usize, char)| {
        c.is_ascii_alphanumeric() || (at > 0 && matches!(c, '.' | '_' | '@' | '+' | '-'))
    };
    match text.char_indices().find(|&at| !allowed(at)) {
        Some((_, found)) => Err(IdError::Character { what, found }),
        None => Ok(()),
    }
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// Most characters an id of this type may have.
            pub const MAX: usize = $max;

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                check($what, $max, text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_id!(
    /// The account that owns API keys, quotas and users. Comes from the key, never from a body or path.
    TenantId, "tenant", 64
);
name_id!(
    /// A person of a tenant: owns a history and an adapter.
    UserId, "user", 128
);
name_id!(
    /// One history item of one user, unique within that user.
    ItemId, "item id", 128
);
name_id!(
    /// One training run for one adapter.
    JobId, "job id", 64
);

name_id!(
    /// A shared adapter of a tenant.
    AdapterName, "adapter name", 128
);

/// Whose adapter within a tenant. As text a user is its id and a shared adapter its name after an `@`, with which no
/// user's id begins: so the two never collide, wherever they are written.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// A person's own adapter.
    User(UserId),
    /// An adapter of the tenant, for any of its users.
    Shared(AdapterName),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(user) => write!(f, "{user}"),
            Self::Shared(name) => write!(f, "@{name}"),
        }
    }
}

impl FromStr for Owner {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.strip_prefix('@') {
            Some(name) => name.parse().map(Self::Shared),
            None => text.parse().map(Self::User),
        }
    }
}

/// Which adapter: its owner within the tenant.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId {
    /// The account.
    pub tenant: TenantId,
    /// The person, or the name of a shared adapter.
    pub owner: Owner,
}

impl AdapterId {
    /// The adapter of `user` within `tenant`.
    #[must_use]
    pub fn new(tenant: TenantId, user: UserId) -> Self {
        Self { tenant, owner: Owner::User(user) }
    }

    /// The adapter `name` that the users of `tenant` share.
    #[must_use]
    pub fn shared(tenant: TenantId, name: AdapterName) -> Self {
        Self { tenant, owner: Owner::Shared(name) }
    }

    /// The person; `None` for a shared adapter.
    #[must_use]
    pub fn user(&self) -> Option<&UserId> {
        match &self.owner {
            Owner::User(user) => Some(user),
            Owner::Shared(_) => None,
        }
    }
}

impl fmt::Display for AdapterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.owner)
    }
}

/// One immutable version of an adapter: the SHA-256 of its base, config and weights.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GenerationId([u8; 32]);

impl GenerationId {
    /// The generation with this hash.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The hash.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first twelve hexadecimal digits, for people.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GenerationId({})", self.short())
    }
}

impl FromStr for GenerationId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        hash_from_hex(text).map(Self).ok_or(IdError::Generation)
    }
}

/// The 32 bytes of a hash in 64 hexadecimal digits; `None` if it is anything else.
#[must_use]
pub fn hash_from_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let digit = |c: u8| (c as char).to_digit(16);
    let mut bytes = [0u8; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(bytes)
}

impl TryFrom<String> for GenerationId {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<GenerationId> for String {
    fn from(id: GenerationId) -> String {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_ids_are_checked() {
        assert!("alice@example.org".parse::<UserId>().is_ok());
        assert!(matches!("".parse::<UserId>(), Err(IdError::Length { len: 0, .. })));
        assert!(matches!("a".repeat(129).parse::<UserId>(), Err(IdError::Length { .. })));
        for bad in ["a/b", "a:b", "a,b", "a b", "..", ".a", "é", "a\n"] {
            assert!(matches!(bad.parse::<UserId>(), Err(IdError::Character { .. })), "{bad:?}");
        }
    }

    #[test]
    fn users_and_shared_adapters_never_collide() {
        for text in ["ann", "@ann", "a@b", "@a@b", "0", "@0"] {
            let owner: Owner = text.parse().expect(text);
            assert_eq!(owner.to_string(), text);
            assert_eq!(matches!(owner, Owner::Shared(_)), text.starts_with('@'), "{text}");
            assert!(text.starts_with('@') != text.parse::<UserId>().is_ok(), "{text}");
        }
        for bad in ["", "@", "@@a", "@.", "@a/b", "@a:b", "a:b", "@ a"] {
            assert!(bad.parse::<Owner>().is_err(), "{bad:?}");
        }
        let (tenant, name): (TenantId, AdapterName) = ("t".parse().expect("t"), "a".parse().expect("a"));
        let user = AdapterId::new(tenant.clone(), "a".parse().expect("a"));
        assert_ne!(AdapterId::shared(tenant, name), user);
    }

    #[test]
    fn generation_round_trips() {
        let id = GenerationId::from_bytes(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(id.to_string().parse::<GenerationId>(), Ok(id));
        assert!("0".repeat(63).parse::<GenerationId>().is_err());
        assert!("é".repeat(32).parse::<GenerationId>().is_err());
    }
}
