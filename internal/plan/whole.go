// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// changed says how the lab as a whole differs from what was recorded.
func (in Input) changed() []string {
	if in.Opened == nil {
		return nil
	}
	var out []string
	if have, want := in.Opened.Expires, in.Want.Expires; have != want {
		out = append(out, fmt.Sprintf("expires changed: %s -> %s", orNever(have), orNever(want)))
	}
	missing := func(from, in []lab.Exposed, format string) {
		for _, e := range from {
			if !slices.Contains(in, e) {
				out = append(out, fmt.Sprintf(format, e, e.Port))
			}
		}
	}
	missing(in.Want.Expose, in.Opened.Expose, "%s leads to port %d of this host")
	missing(in.Opened.Expose, in.Want.Expose, "%s no longer leads to port %d of this host")
	switch {
	case in.Want.InheritProxy && !in.Opened.InheritProxy:
		out = append(out, "guests get the proxy settings of this host")
	case !in.Want.InheritProxy && in.Opened.InheritProxy:
		out = append(out, "guests no longer get the proxy settings of this host")
	}
	return out
}

func orNever(d time.Duration) string {
	if d == 0 {
		return "never"
	}
	return d.String()
}
