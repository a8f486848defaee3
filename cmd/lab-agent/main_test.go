// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"testing"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/providers"
)

func TestPortName(t *testing.T) {
	if agentapi.Port != providers.AgentPort {
		t.Errorf("the agent opens %q, providers offer %q", agentapi.Port, providers.AgentPort)
	}
}

func TestUsage(t *testing.T) {
	err := run(t.Context(), []string{"serve", "me"})
	if want := `unknown arguments ["serve" "me"]; usage: lab-agent [sftp|files|volumes|folder CONFIG|mount CONFIG|version]`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}
