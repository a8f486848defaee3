// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"strings"

	"github.com/labfile/lab/internal/lab"
)

// policy returns why a generation is to be replaced although it is what the Labfile
// asks for.
func (r Recorded) policy() []string {
	var why []string
	if len(r.Tainted) > 0 {
		why = append(why, "tainted: "+strings.Join(r.Tainted, "; "))
	}
	if r.Expired != "" {
		why = append(why, "expired: "+r.Expired)
	}
	return why
}

// policies says which of the rules about a machine changed: they hold at once.
func policies(have, want lab.Machine) []string {
	var changes []string
	if orUsual(have.Replace) != orUsual(want.Replace) {
		changes = append(changes, "replace changed")
	}
	if a, b := orAllow(have.OnShell), orAllow(want.OnShell); a != b {
		changes = append(changes, "on_shell changed: "+string(a)+" -> "+string(b))
	}
	if have.MaxAge != want.MaxAge {
		changes = append(changes, "max_age changed: "+have.MaxAge.String()+" -> "+want.MaxAge.String())
	}
	if have.Idle != want.Idle {
		changes = append(changes, "idle changed: "+have.Idle.String()+" -> "+want.Idle.String())
	}
	return changes
}

func orUsual(r lab.Replace) lab.Replace {
	if r == (lab.Replace{}) {
		return lab.DefaultReplace
	}
	return r
}

func orAllow(s lab.Shell) lab.Shell {
	if s == "" {
		return lab.ShellAllow
	}
	return s
}
