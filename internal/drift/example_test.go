// SPDX-License-Identifier: Apache-2.0

package drift_test

import (
	"fmt"

	"github.com/labfile/lab/internal/drift"
)

// The list of what is hidden is written like a .gitignore; a later pattern may take back
// what an earlier one hides.
func ExampleParseIgnore() {
	hidden, err := drift.ParseIgnore("/var/log/*\n*.pyc\n", "!/var/log/app.log\n")
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, path := range []string{"/var/log/syslog", "/var/log/app.log", "/srv/app.pyc", "/etc/motd"} {
		fmt.Println(path, hidden.Match(path, false))
	}
	// Output:
	// /var/log/syslog true
	// /var/log/app.log false
	// /srv/app.pyc true
	// /etc/motd false
}
