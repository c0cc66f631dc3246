package procri

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// imageService is the image half of CRI, over the image table.
type imageService struct {
	runtimeapi.UnimplementedImageServiceServer
	images *imageTable
	// mountpoint is the mount that procri's files are on.
	mountpoint string
}

func (s *imageService) ListImages(
	_ context.Context, request *runtimeapi.ListImagesRequest,
) (*runtimeapi.ListImagesResponse, error) {
	known, err := s.images.list()
	if err != nil {
		return nil, err
	}
	response := &runtimeapi.ListImagesResponse{}
	wanted := request.GetFilter().GetImage().GetImage()
	for name, image := range known {
		if wanted == "" || wanted == name || wanted == imageID(name) {
			response.Images = append(response.Images, image.describe(name))
		}
	}
	slices.SortFunc(response.Images, func(a, b *runtimeapi.Image) int { return strings.Compare(a.Spec.Image, b.Spec.Image) })
	return response, nil
}

// ImageStatus answers without an image if there is none of that name.
func (s *imageService) ImageStatus(
	_ context.Context, request *runtimeapi.ImageStatusRequest,
) (*runtimeapi.ImageStatusResponse, error) {
	image, name, err := s.images.find(request.GetImage().GetImage())
	if errors.Is(err, errNoImage) {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ImageStatusResponse{Image: image.describe(name)}, nil
}

func (s *imageService) PullImage(
	_ context.Context, request *runtimeapi.PullImageRequest,
) (*runtimeapi.PullImageResponse, error) {
	_, name, err := s.images.find(request.GetImage().GetImage())
	if errors.Is(err, errNoImage) {
		return nil, status.Error(codes.NotFound, err.Error())
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: imageID(name)}, nil
}

// RemoveImage has nothing to remove: the table is not procri's.
func (s *imageService) RemoveImage(context.Context, *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	return &runtimeapi.RemoveImageResponse{}, nil
}

func (s *imageService) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(s.mountpoint, &stat); err != nil {
		return nil, err
	}
	usage := []*runtimeapi.FilesystemUsage{{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: s.mountpoint},
		UsedBytes:  &runtimeapi.UInt64Value{Value: (stat.Blocks - stat.Bfree) * uint64(stat.Bsize)},
		InodesUsed: &runtimeapi.UInt64Value{Value: stat.Files - stat.Ffree},
	}}
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: usage, ContainerFilesystems: usage}, nil
}
