// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// HostMemory returns the memory of this host.
func HostMemory() (providers.HostMemory, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return providers.HostMemory{}, fmt.Errorf("asking for the host's memory: %w", err)
	}
	// Without this file the kernel's usual rule is assumed, 0 (proc_sys_vm(5)).
	mode, _ := os.ReadFile("/proc/sys/vm/overcommit_memory")
	unit := lab.Bytes(info.Unit)
	return providers.HostMemory{
		RAM: lab.Bytes(info.Totalram) * unit, Swap: lab.Bytes(info.Totalswap) * unit,
		Unbounded: string(bytes.TrimSpace(mode)) == "1",
	}, nil
}
