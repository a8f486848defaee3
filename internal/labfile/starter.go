// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	_ "embed"
	"strings"
)

//go:embed starter.yaml
var starter string

// Starter returns a commented Labfile for a new lab called name, which must be a
// valid name (lab.ValidLabel). It describes a lab that comes up as it is.
func Starter(name string) []byte {
	return []byte(strings.Replace(starter, "lab: example\n", "lab: "+name+"\n", 1))
}
