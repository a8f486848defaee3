// SPDX-License-Identifier: Apache-2.0

package build

import (
	"embed"
	"io/fs"
)

//go:embed all:embedded
var embedded embed.FS

// AgentIncluded reports whether this binary carries lab-agent, which make puts
// into it. Boxes built without are reached by ssh alone.
func AgentIncluded() bool {
	_, err := fs.Stat(embedded, "embedded/lab-agent")
	return err == nil
}

// Agent returns lab-agent, or nil if this binary does not carry it.
func Agent() []byte {
	b, err := embedded.ReadFile("embedded/lab-agent")
	if err != nil {
		return nil
	}
	return b
}
