"""Setting a deployment up, once: database, sealing key, signing keys, operator organization."""

from dataclasses import dataclass, field

from coatcheck import base62, ids
from coatcheck.scope import ORGANIZATION_PERMISSIONS
from coatcheck.server import sealing, signing
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import api_keys, forms, projects
from coatcheck.server.manage.errors import Conflict
from coatcheck.server.settings import Settings
from coatcheck.server.store import Store
from coatcheck.server.store.tables import Deployment, Organization


class NotInitialized(Exception):
    """There is no deployment in this database yet."""


class OtherDeployment(Exception):
    """The database belongs to a deployment with another issuer."""


@dataclass(frozen=True, slots=True)
class Initialized:
    """A new deployment: the only time its admin key is shown."""

    issuer: str
    organization_id: str
    key_id: str
    key: str = field(repr=False)

    def to_json(self) -> dict[str, object]:
        return {
            "issuer": self.issuer,
            "organization": self.organization_id,
            "keyId": self.key_id,
            "key": self.key,
        }


def initialize(
    settings: Settings,
    catalog: Catalog,
    store: Store,
    actor: Actor,
    *,
    now: int,
    organization_name: str,
) -> Initialized:
    """Set up a deployment: all of it in one transaction, so that a crash leaves none of it.

    Raises:
        Conflict: it was set up before; nothing was changed.
        Invalid: the organization's name.
        BadSealingKey: the keys directory cannot hold the sealing key.
        StoreUnavailable, SchemaMismatch: the database cannot be used.
    """
    name = forms.name(organization_name)
    if is_initialized(store):
        raise Conflict("this deployment is initialized already; nothing was changed")
    sealing_key = sealing.load_or_create(settings.keys_dir).newest()
    store.upgrade(create=True)
    organization = Organization(
        id=ids.new_id("org", now * 1000),
        name=name,
        is_operator=True,
        created_at=now,
        bootstrapped_at=now,
    )
    project = projects.default_of(organization.id, now)
    new = api_keys.NewApiKey(
        organization_id=organization.id,
        name="admin",
        scopes=ORGANIZATION_PERMISSIONS,
        audiences=(settings.management_audience,),
    )
    admin = api_keys.prepare(catalog, new, actor, now=now, issuer=settings.issuer)
    lines = signing.first_lines({audience.algorithm for audience in catalog.audiences.values()})
    signing_keys = [
        signing.new_row(
            algorithm, sealing_key, now=now, starts_at=now, purpose=purpose, position=position
        )
        for position, (purpose, algorithm) in enumerate(lines, start=1)
    ]
    with store.transaction() as tx:
        if tx.deployment() is not None:
            raise Conflict("this deployment is initialized already; nothing was changed")
        tx.add(Deployment(issuer=settings.issuer, log=base62.random_text(22), created_at=now))
        tx.add(organization, project, *signing_keys)
        tx.add_api_keys([admin.api_key], [admin.secret])
        tx.append(
            [
                Change(What.ORGANIZATION_CREATED, organization.id, actor, now, organization.id),
                projects.change_of(What.PROJECT_CREATED, project, actor, now, name=project.name),
                admin.change,
                *(signing.created(signing_key, actor) for signing_key in signing_keys),
            ]
        )
    return Initialized(settings.issuer, organization.id, admin.id, admin.key)


def is_initialized(store: Store) -> bool:
    """Whether a deployment was set up in this store.

    Raises:
        StoreUnavailable, SchemaMismatch: the database is there and cannot be used.
    """
    if not store.exists():
        return False
    store.check_schema()
    with store.transaction(read_only=True) as tx:
        return tx.deployment() is not None


def require_deployment(settings: Settings, store: Store) -> None:
    """The database holds the deployment that the settings describe.

    Raises:
        NotInitialized, OtherDeployment, StoreUnavailable, SchemaMismatch: what is wrong, and how
            to mend it.
    """
    if not is_initialized(store):
        raise NotInitialized("nothing is initialized yet: run coatcheck init")
    with store.transaction(read_only=True) as tx:
        deployment = tx.deployment()
    if deployment is not None and deployment.issuer != settings.issuer:
        raise OtherDeployment(
            f"this database belongs to the issuer {deployment.issuer}, and COATCHECK_ISSUER is"
            f" {settings.issuer}: set it to the former, or use another COATCHECK_DATABASE_URL"
        )
