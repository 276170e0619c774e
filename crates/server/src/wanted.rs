//! Who is to answer: the base, a user's adapter or a shared one; from `model`, `user` and `adapter_id`.

use types::{AdapterName, Owner, UserId};

use crate::error::{ApiError, Code};
use crate::fault::invalid_id;

/// Who is to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The base alone.
    Base,
    /// The user's adapter if there is one, else the base.
    IfTrained(UserId),
    /// This user's adapter and nothing else.
    Named(UserId),
    /// This shared adapter and nothing else, for a user if one is named.
    Shared(AdapterName, Option<UserId>),
}

impl Wanted {
    /// Reads OpenAI's `model` (`<base>`, `<base>:<user>` or `<base>:@<shared adapter>`) and `user`.
    pub(crate) fn openai(base: &str, model: &str, user: Option<&str>) -> Result<Self, ApiError> {
        let named = by_model(base, model)?;
        let user = user.map(|user| user.parse::<UserId>().map_err(|error| invalid_id("user", &error)));
        match (named, user.transpose()?) {
            (None, None) => Ok(Self::Base),
            (None, Some(user)) => Ok(Self::IfTrained(user)),
            (Some(Owner::Shared(name)), user) => Ok(Self::Shared(name, user)),
            (Some(Owner::User(named)), None) => Ok(Self::Named(named)),
            (Some(Owner::User(named)), Some(user)) if named == user => Ok(Self::Named(named)),
            (Some(Owner::User(_)), Some(_)) => {
                let message = "model and user name different users: name one of them";
                Err(ApiError::new(Code::InvalidValue, message).param("user"))
            }
        }
    }

    /// Reads LoRAX's `adapter_id`: `<user>` or `@<shared adapter>`, alone or after `<base>:`.
    pub(crate) fn tgi(base: &str, adapter_id: Option<&str>) -> Result<Self, ApiError> {
        let Some(id) = adapter_id else { return Ok(Self::Base) };
        let named = match id.parse::<Owner>() {
            Ok(owner) if id != base => Some(owner),
            _ => by_model(base, id)?,
        };
        Ok(match named {
            None => Self::Base,
            Some(Owner::User(user)) => Self::Named(user),
            Some(Owner::Shared(name)) => Self::Shared(name, None),
        })
    }

    /// The user who is named, one way or the other: for whom the answer is.
    pub(crate) fn user(&self) -> Option<&UserId> {
        match self {
            Self::Base => None,
            Self::IfTrained(user) | Self::Named(user) => Some(user),
            Self::Shared(_, user) => user.as_ref(),
        }
    }

    /// Whose adapter answers, if there is one.
    pub(crate) fn owner(&self) -> Option<Owner> {
        match self {
            Self::Base => None,
            Self::IfTrained(user) | Self::Named(user) => Some(Owner::User(user.clone())),
            Self::Shared(name, _) => Some(Owner::Shared(name.clone())),
        }
    }
}

/// The owner of the adapter in a model name; `None` for the base.
pub(crate) fn by_model(base: &str, model: &str) -> Result<Option<Owner>, ApiError> {
    match model.strip_prefix(base) {
        Some("") => Some(None),
        Some(rest) => rest.strip_prefix(':').and_then(|owner| owner.parse().ok()).map(Some),
        None => None,
    }
    .ok_or_else(|| unknown_model(model))
}

/// No such model. A user of another tenant, and one who has no adapter, get the same answer.
pub(crate) fn unknown_model(model: &str) -> ApiError {
    let message = format!("the model {model:?} does not exist or you do not have access to it");
    ApiError::new(Code::ModelNotFound, message).param("model")
}

/// The name under which an adapter is a model.
pub(crate) fn model_of(base: &str, owner: &Owner) -> String {
    format!("{base}:{owner}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> UserId {
        name.parse().expect("user")
    }

    fn shared(name: &str, user: Option<UserId>) -> Wanted {
        Wanted::Shared(name.parse().expect("name"), user)
    }

    #[test]
    fn models_and_users() {
        let wanted = |model, user| Wanted::openai("org/base", model, user);
        assert_eq!(wanted("org/base", None).expect("base"), Wanted::Base);
        assert_eq!(wanted("org/base", Some("ann")).expect("user"), Wanted::IfTrained(user("ann")));
        assert_eq!(wanted("org/base:ann", None).expect("named"), Wanted::Named(user("ann")));
        assert_eq!(wanted("org/base:ann", Some("ann")).expect("both"), Wanted::Named(user("ann")));
        assert_eq!(wanted("org/base:@ann", None).expect("shared"), shared("ann", None));
        assert_eq!(wanted("org/base:@ann", Some("ann")).expect("shared"), shared("ann", Some(user("ann"))));
        for (model, given, code, param) in [
            ("org/base", Some("@ann"), Code::InvalidValue, "user"),
            ("org/base:@", None, Code::ModelNotFound, "model"),
            ("org/base:@@ann", None, Code::ModelNotFound, "model"),
            ("org/base@ann", None, Code::ModelNotFound, "model"),
            ("@ann", None, Code::ModelNotFound, "model"),
            ("org/base:ann", Some("bob"), Code::InvalidValue, "user"),
            ("org/base", Some(""), Code::InvalidValue, "user"),
            ("org/base", Some("a/b"), Code::InvalidValue, "user"),
            ("", None, Code::ModelNotFound, "model"),
            ("ann", None, Code::ModelNotFound, "model"),
            ("org/base:", None, Code::ModelNotFound, "model"),
            ("org/base:a:b", None, Code::ModelNotFound, "model"),
            ("org/base2", None, Code::ModelNotFound, "model"),
            ("org/bas", None, Code::ModelNotFound, "model"),
        ] {
            let error = wanted(model, given).expect_err(model);
            assert_eq!(error.code(), code, "{model} {given:?}");
            assert_eq!(error.body().error.param.as_deref(), Some(param), "{model} {given:?}");
        }
    }

    #[test]
    fn adapter_ids() {
        assert_eq!(Wanted::tgi("base", None).expect("none"), Wanted::Base);
        assert_eq!(Wanted::tgi("base", Some("base")).expect("base"), Wanted::Base);
        assert_eq!(Wanted::tgi("base", Some("ann")).expect("user"), Wanted::Named(user("ann")));
        assert_eq!(Wanted::tgi("base", Some("base:ann")).expect("model"), Wanted::Named(user("ann")));
        assert_eq!(Wanted::tgi("base", Some("@ann")).expect("shared"), shared("ann", None));
        assert_eq!(Wanted::tgi("base", Some("base:@ann")).expect("shared"), shared("ann", None));
        for id in ["", "@", "@base/x", "other:ann", "../ann", "base:"] {
            assert_eq!(Wanted::tgi("base", Some(id)).expect_err(id).code(), Code::ModelNotFound);
        }
    }
}
