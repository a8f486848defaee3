// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"

	"github.com/labfile/lab/providers/local"
)

// overlay names the file and the node of overlay n.
func overlay(dir string, n int) Overlay {
	o := Overlay{Path: local.OverlayPath(dir, n), Node: deviceDisk}
	if n > 0 {
		o.Node = fmt.Sprintf("%s%d", nodePrefix, n)
	}
	return o
}

const nodePrefix = deviceDisk + "-"

// overlayOf returns the number of the overlay that QEMU calls node.
func overlayOf(node string) (int, error) {
	if node == deviceDisk {
		return 0, nil
	}
	if n, ok := local.Number(node, nodePrefix, ""); ok {
		return n, nil
	}
	return 0, fmt.Errorf("the machine writes to %q, which is no overlay of its own", node)
}
