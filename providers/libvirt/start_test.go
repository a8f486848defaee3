// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"testing"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/providers"
)

// TestToldWhy starts domains whose QEMU ends at once. What libvirt says then depends on
// who is faster.
func TestToldWhy(t *testing.T) {
	silent := golibvirt.Error{Code: uint32(golibvirt.ErrSystemError), Message: "failed to connect to monitor socket: Connection refused"}
	reason := golibvirt.Error{
		Code:    uint32(golibvirt.ErrInternalError),
		Message: `internal error: process exited while connecting to monitor: qemu-system-x86_64: Failed to get "write" lock`,
	}
	other := golibvirt.Error{Code: uint32(golibvirt.ErrSystemError), Message: "cannot open file: No such file or directory"}
	for _, c := range []struct {
		name  string
		say   []error
		want  error
		asked int
	}{
		{"starts", []error{nil}, nil, 1},
		{"tells", []error{reason}, reason, 1},
		{"silent once", []error{silent, reason}, reason, 2},
		{"silent, then starts", []error{fmt.Errorf("wrapped: %w", silent), nil}, nil, 2},
		{"silent for ever", []error{silent, silent, silent, nil}, silent, attempts},
		{"another error of the system", []error{other, nil}, other, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			asked := 0
			err := toldWhy(t.Context(), func() error { asked++; return c.say[asked-1] })
			if !errors.Is(err, c.want) || asked != c.asked {
				t.Errorf("got %v after %d attempts, want %v after %d", err, asked, c.want, c.asked)
			}
		})
	}
}

func TestNewEnough(t *testing.T) {
	for qemu, want := range map[uint64]string{
		7_002_000: "", 7_002_022: "", 10_000_000: "",
		7_001_999: "host not capable: QEMU at qemu+ssh://far/system is 7.1.999, and machines need 7.2.0 or newer",
	} {
		err := newEnough(qemu, "qemu+ssh://far/system")
		if got := fmt.Sprint(err); want == "" && err != nil || want != "" && (got != want || !errors.Is(err, providers.ErrIncapable)) {
			t.Errorf("%d: %v", qemu, err)
		}
	}
}
