"""How clients reach a vTPM: filter, resource manager, devices and sockets."""
