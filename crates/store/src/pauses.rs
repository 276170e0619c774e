//! Pauses: whose jobs are left alone for now.

use types::{TenantId, UserId};

use crate::{Store, StoreError, sql};

impl Store {
    /// Pauses the training of a tenant, or of one of its users, or lets it go on. A job that runs is given back by its
    /// worker; what it has done is kept. The user need not exist yet.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn set_pause(
        &self,
        tenant: &TenantId,
        user: Option<&UserId>,
        paused: bool,
    ) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        sql::claims::set_pause(&mut tx, tenant, user, paused).await?;
        tx.commit().await?;
        self.interrupt();
        Ok(())
    }

    /// Whether the tenant's training is paused, and whether the user's own is.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn pauses(&self, tenant: &TenantId, user: Option<&UserId>) -> Result<(bool, bool), StoreError> {
        sql::claims::pauses(&mut *self.read().await?, tenant, user).await
    }
}
