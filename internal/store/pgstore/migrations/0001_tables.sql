-- One row: what the database says of itself. It is updated by every write, so
-- that its lock orders them; the room in its page lets that happen in place.
create table mesh_state (
    single         boolean primary key default true check (single),
    schema_version integer not null,
    revision       bigint  not null,
    written        text    not null,
    holder         text    not null,
    instance       text    not null,
    since          timestamptz
) with (fillfactor = 10);

comment on table mesh_state is 'The control plane that serves from this database. Not to be changed by hand.';
comment on column mesh_state.revision is 'the number of the last transaction';
comment on column mesh_state.written is 'a token of the last transaction, by which its writer knows it again';
comment on column mesh_state.holder is 'a token of the control plane that may write; nobody else''s transaction is taken';
comment on column mesh_state.instance is 'its name';
comment on column mesh_state.since is 'when it took over';

insert into mesh_state (schema_version, revision, written, holder, instance) values (1, 0, '', '', '');

create table mesh_resources (
    kind     text   collate "C" not null,
    mesh     text   collate "C" not null,
    name     text   collate "C" not null,
    revision bigint not null,
    data     bytea  not null,
    primary key (kind, mesh, name)
);

comment on table mesh_resources is 'All resources, secrets too. A control plane reads them when it takes over; not to be changed by hand.';
comment on column mesh_resources.revision is 'that of the transaction which wrote the row';
comment on column mesh_resources.data is 'the resource as JSON in UTF-8: convert_from(data, ''UTF8'')';
