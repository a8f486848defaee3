// SPDX-License-Identifier: Apache-2.0

package main

import (
	"runtime"
	"runtime/debug"

	"github.com/labfile/lab/boxes/build"
	"github.com/labfile/lab/internal/cli"
)

// version is set by the linker: -X main.version=….
var version string

// buildVersion says what this program was built from.
func buildVersion() cli.Version {
	v := cli.Version{
		Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, Agent: build.AgentIncluded(),
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			v.Commit = s.Value
		}
	}
	if v.Version == "" {
		v.Version = info.Main.Version
	}
	return v
}
