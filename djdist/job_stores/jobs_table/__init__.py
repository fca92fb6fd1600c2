"""The jobs table ``~~table_name`` of DataJoint, and the keys that a table lacks, through SQLAlchemy."""
