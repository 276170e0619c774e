//! Who is asking: the tenant behind an API key.

use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use types::TenantId;

use crate::app::App;
use crate::error::{ApiError, Code};

/// The tenant of a server without keys.
const OPEN_TENANT: &str = "default";

/// An API key as the server knows it.
#[derive(Debug, Clone)]
pub struct ApiKey {
    /// SHA-256 of the key's text.
    pub sha256: [u8; 32],
    /// Whose key it is.
    pub tenant: TenantId,
    /// Whether it may do what concerns all tenants.
    pub operator: bool,
}

/// Who may ask.
#[derive(Debug, Clone)]
pub enum Auth {
    /// Everybody who can connect, as the tenant `default` and its operator: for a server on loopback. Keys are not looked
    /// at.
    Open,
    /// Those who have one of these keys.
    Keys(Vec<ApiKey>),
}

impl Auth {
    /// Who presents `key`. The time it takes does not depend on how much of a key is right.
    fn principal(&self, key: Option<&str>) -> Option<Principal> {
        let keys = match self {
            Self::Open => return Some(Principal { tenant: OPEN_TENANT.parse().ok()?, operator: true }),
            Self::Keys(keys) => keys,
        };
        let presented: [u8; 32] = Sha256::digest(key?).into();
        let mut found = None;
        for key in keys {
            if bool::from(key.sha256.ct_eq(&presented)) {
                found = Some(Principal { tenant: key.tenant.clone(), operator: key.operator });
            }
        }
        found
    }
}

/// Who is asking. Handlers get a tenant from here and from nowhere else.
#[derive(Debug, Clone)]
pub(crate) struct Principal {
    pub(crate) tenant: TenantId,
    pub(crate) operator: bool,
}

/// Who is asking, with an operator's key.
#[derive(Debug, Clone)]
pub(crate) struct Operator(pub(crate) Principal);

impl FromRequestParts<App> for Operator {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let principal = Principal::from_request_parts(parts, app).await?;
        if !principal.operator {
            return Err(ApiError::new(
                Code::OperatorKeyNeeded,
                "this concerns all tenants: it needs an operator's key",
            ));
        }
        Ok(Self(principal))
    }
}

impl FromRequestParts<App> for Principal {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let header = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let (scheme, key) = header.and_then(|header| header.split_once(' ')).unwrap_or_default();
        let key = Some(key.trim()).filter(|key| scheme.eq_ignore_ascii_case("bearer") && !key.is_empty());
        let refused = match key {
            Some(_) => "this API key is not valid",
            None => "an API key is needed: send the header Authorization: Bearer <key>",
        };
        app.auth.principal(key).ok_or_else(|| ApiError::new(Code::InvalidApiKey, refused))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str, tenant: &str) -> ApiKey {
        let operator = text == "k2";
        ApiKey { sha256: Sha256::digest(text).into(), tenant: tenant.parse().expect("tenant"), operator }
    }

    #[test]
    fn keys_lead_to_their_tenants() {
        let auth = Auth::Keys(vec![key("k1", "acme"), key("k2", "initech"), key("k3", "acme")]);
        let tenant = |text| auth.principal(text).map(|principal| String::from(principal.tenant));
        let operator = |auth: &Auth, text| auth.principal(text).map(|principal| principal.operator);
        let operators = ["k1", "k2", "k3"].map(|text| operator(&auth, Some(text)));
        assert_eq!(operators, [Some(false), Some(true), Some(false)]);
        assert_eq!(operator(&Auth::Open, None), Some(true));
        assert_eq!(tenant(Some("k1")).as_deref(), Some("acme"));
        assert_eq!(tenant(Some("k2")).as_deref(), Some("initech"));
        assert_eq!(tenant(Some("k3")).as_deref(), Some("acme"));
        for wrong in [None, Some(""), Some("k"), Some("k1 "), Some("K1")] {
            assert_eq!(tenant(wrong), None, "{wrong:?}");
        }
        assert_eq!(operator(&Auth::Keys(Vec::new()), Some("k1")), None);
        let open = Auth::Open.principal(None).map(|principal| String::from(principal.tenant));
        assert_eq!(open.as_deref(), Some("default"));
    }
}
