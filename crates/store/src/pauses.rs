//! Pauses: whose jobs are left alone for now, since when, by whom and why.

use types::{AdapterId, TenantId, Timestamp, UserId};

use crate::{Store, StoreError, sql};

/// Whose training a pause holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PauseScope {
    /// Everybody's.
    Server,
    /// That of a tenant's users.
    Tenant(TenantId),
    /// That of one user, who need not exist yet.
    User(TenantId, UserId),
}

impl PauseScope {
    /// As the table has it: tenant and user, empty for all of them.
    pub(crate) fn names(&self) -> (&str, &str) {
        match self {
            Self::Server => ("", ""),
            Self::Tenant(tenant) => (tenant.as_str(), ""),
            Self::User(tenant, user) => (tenant.as_str(), user.as_str()),
        }
    }

    /// The scope of an adapter's owner; `None` for a shared adapter, which is not trained.
    pub(crate) fn of(adapter: &AdapterId) -> Option<Self> {
        adapter.user().map(|user| Self::User(adapter.tenant.clone(), user.clone()))
    }
}

/// A pause that holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// Since when; absent if an older program set it.
    pub since: Option<Timestamp>,
    /// The tenant with whose key it was set; absent if an older program set it.
    pub by: Option<TenantId>,
    /// Why, in the words of who set it.
    pub reason: Option<String>,
}

/// The pauses that a user, or a tenant, is under.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pauses {
    /// That of the whole server.
    pub server: Option<Pause>,
    /// That of the tenant.
    pub tenant: Option<Pause>,
    /// That of the user.
    pub user: Option<Pause>,
}

impl Store {
    /// Pauses training. A job that runs is given back by its worker; what it has done is kept. A pause that holds already
    /// stays as it is, with its time and reason.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn pause(
        &self,
        scope: &PauseScope,
        by: &TenantId,
        reason: Option<&str>,
    ) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        sql::claims::pause(&mut tx, scope, by, reason, self.now()).await?;
        tx.commit().await?;
        self.interrupt();
        Ok(())
    }

    /// Lifts a pause; those of other scopes stay.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn resume(&self, scope: &PauseScope) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        sql::claims::resume(&mut tx, scope).await?;
        tx.commit().await?;
        self.interrupt();
        Ok(())
    }

    /// The pauses that hold a tenant's training, or that of one of its users.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn pauses(&self, tenant: &TenantId, user: Option<&UserId>) -> Result<Pauses, StoreError> {
        sql::claims::pauses(&mut *self.read().await?, tenant, user).await
    }
}
