// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package guest

import (
	"errors"
	"os"
)

func duplicate(int) (*os.File, error) { return nil, errors.ErrUnsupported }
