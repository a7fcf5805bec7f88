-- Gives a role exactly its rights on the study tables; run by `bdense-search storage init` as the
-- database's owner. Names in braces are filled in: database and role are quoted; tables and
-- sequences are privileges, of a role that may only read SELECT and SELECT.
REVOKE ALL ON DATABASE {database} FROM PUBLIC;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role};
REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM {role};
GRANT CONNECT ON DATABASE {database} TO {role};
GRANT USAGE ON SCHEMA public TO {role};
GRANT {tables} ON ALL TABLES IN SCHEMA public TO {role};
GRANT {sequences} ON ALL SEQUENCES IN SCHEMA public TO {role};
-- For tables that a later upgrade creates.
ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE ALL ON TABLES FROM {role};
ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE ALL ON SEQUENCES FROM {role};
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT {tables} ON TABLES TO {role};
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT {sequences} ON SEQUENCES TO {role};
