// SPDX-License-Identifier: Apache-2.0

package qemu

// The kinds of sockets, as dirs.Socket names them.
const (
	socketMonitor = "qmp"
	socketNIC     = "nic"
	socketAgent   = "agt"
	socketConsole = "con"
)
