"""The processes of a cluster: command lines, configuration, credentials, images."""
