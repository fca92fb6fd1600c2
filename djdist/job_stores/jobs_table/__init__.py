"""The jobs table ``~~table_name`` of DataJoint, through SQLAlchemy."""
