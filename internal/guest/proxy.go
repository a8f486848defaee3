// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	_ "embed" // proxy.sh
	"fmt"
	"io"
	"strings"

	"github.com/labfile/lab/internal/proxy"
)

//go:embed proxy.sh
var proxyProgram string

// SetProxy writes proxy settings, NAME=VALUE, to where logins and services of the guest
// find them: /etc/environment, and systemd if it runs there. Without settings it removes what an earlier call wrote. What is
// so already is left alone.
func (c *RootClient) SetProxy(ctx context.Context, env []string) error {
	said := &tail{}
	argv := append(append([]string{}, c.before...), "sh", "-c", proxyProgram, "lab", strings.Join(proxy.Variables(), " "))
	err := c.Run(ctx, Command{Args: argv, Stdin: strings.NewReader(lines(env)), Stdout: io.Discard, Stderr: said})
	if text := strings.TrimSpace(said.String()); err != nil && text != "" {
		return fmt.Errorf("%s (%w)", text, err)
	}
	return err
}

func lines(env []string) string {
	if len(env) == 0 {
		return ""
	}
	return strings.Join(env, "\n") + "\n"
}

// proxyBoothook is a boothook for cloud-init that does what SetProxy does. cloud-init runs
// boothooks at every boot, before it starts anything that would need a proxy; this one does
// its work at the first boot only.
func proxyBoothook(env []string) []byte {
	argv := append([]string{
		"cloud-init-per", "instance", "lab-proxy", "sh", "-c", `program=$1 all=$2; shift 2; printf '%s\n' "$@" | sh -c "$program" lab "$all"`, "lab",
		proxyProgram, strings.Join(proxy.Variables(), " "),
	}, env...)
	return []byte("#cloud-boothook\n#!/bin/sh\nexec " + Quote(argv) + "\n")
}
