// SPDX-License-Identifier: Apache-2.0

package labfile_test

import (
	"fmt"

	"github.com/labfile/lab/internal/labfile"
)

func ExampleParse() {
	l, err := labfile.Parse("Labfile", []byte(`
lab: shop
machines:
  db: {box: builtin/debian-12}
  web: {box: "${BOX}", count: 2, depends_on: [db], ports: ["0:80"]}
`), labfile.Options{Vars: map[string]string{"BOX": "builtin/tiny"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, m := range l.Machines {
		fmt.Println(m.Name, m.Box, m.Memory, m.DependsOn, m.Ports)
	}
	// Output:
	// db builtin/debian-12 512MiB [] []
	// web-1 builtin/tiny 128MiB [db] [0:80]
	// web-2 builtin/tiny 128MiB [db] [0:80]
}

// Every problem is told at once, by its place.
func ExampleParse_problems() {
	_, err := labfile.Parse("Labfile", []byte(`
lab: shop
machines:
  web: {box: builtin/tiny, memroy: 256MiB, depends_on: [bd]}
  db: {box: builtin/debian-12, memory: 64MiB}
`), labfile.Options{})
	fmt.Println(err)
	// Output:
	// Labfile:4:28: machines.web: unknown key "memroy"; did you mean "memory"?
	// Labfile:4:57: machines.web.depends_on[0]: there is no machine "bd"; did you mean "db"?
	// Labfile:5:40: machines.db.memory: 64MiB is below the 256MiB that builtin/debian-12 needs
}
