using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>Data passed to NVIDIA's libraries has the layout of their headers, and a missing library is reported in one sentence.</summary>
public sealed class BindingsTests
{
    [Fact]
    public void Structs_have_the_sizes_of_the_headers()
    {
        Assert.Equal(16, Unsafe.SizeOf<CUuuid>());
        Assert.Equal(64, Unsafe.SizeOf<CUipcMemHandle>());
        Assert.Equal(64, Unsafe.SizeOf<CUipcEventHandle>());
        Assert.Equal(56, Unsafe.SizeOf<CUlaunchConfig>());
        Assert.Equal(24, (int)Marshal.OffsetOf<CUlaunchConfig>(nameof(CUlaunchConfig.SharedMemBytes)));
        Assert.Equal(32, (int)Marshal.OffsetOf<CUlaunchConfig>(nameof(CUlaunchConfig.hStream)));
        Assert.Equal(40, (int)Marshal.OffsetOf<CUlaunchConfig>(nameof(CUlaunchConfig.attrs)));
        Assert.Equal(48, (int)Marshal.OffsetOf<CUlaunchConfig>(nameof(CUlaunchConfig.numAttrs)));
        Assert.Equal(72, Unsafe.SizeOf<CUlaunchAttribute>());
        Assert.Equal(8, (int)Marshal.OffsetOf<CUlaunchAttribute>(nameof(CUlaunchAttribute.value)));
        Assert.Equal(128, Unsafe.SizeOf<ncclUniqueId>());
        Assert.Equal(24, Unsafe.SizeOf<ncclConfig>()); // of NCCL 2.14, which later versions still accept
        Assert.Equal(8, (int)Marshal.OffsetOf<ncclConfig>(nameof(ncclConfig.Magic)));
        Assert.Equal(16, (int)Marshal.OffsetOf<ncclConfig>(nameof(ncclConfig.Blocking)));
        Assert.Equal(64, Unsafe.SizeOf<cublasLtMatmulAlgo>());
        Assert.Equal(96, Unsafe.SizeOf<cublasLtMatmulHeuristicResult>());
        Assert.Equal(64, (int)Marshal.OffsetOf<cublasLtMatmulHeuristicResult>(nameof(cublasLtMatmulHeuristicResult.WorkspaceBytes)));
        Assert.Equal(72, (int)Marshal.OffsetOf<cublasLtMatmulHeuristicResult>(nameof(cublasLtMatmulHeuristicResult.State)));
        Assert.Equal(76, (int)Marshal.OffsetOf<cublasLtMatmulHeuristicResult>(nameof(cublasLtMatmulHeuristicResult.WavesCount)));
        Assert.Equal(80, (int)Marshal.OffsetOf<cublasLtMatmulHeuristicResult>(nameof(cublasLtMatmulHeuristicResult.Reserved)));
    }

    [Fact]
    public void Structs_that_kernels_read_have_the_layout_that_their_sources_say()
    {
        Assert.Equal(56, Unsafe.SizeOf<SampleQuery>());
        Assert.Equal(24, (int)Marshal.OffsetOf<SampleQuery>(nameof(SampleQuery.Seed)));
        Assert.Equal(52, (int)Marshal.OffsetOf<SampleQuery>(nameof(SampleQuery.AlternativesCount)));
        Assert.Equal(sizeof(int) * CudaAttentionPlan.ItemNumbers, Unsafe.SizeOf<CudaAttentionPlan.Item>());
        Assert.Equal(24, (int)Marshal.OffsetOf<CudaAttentionPlan.Item>(nameof(CudaAttentionPlan.Item.Last)));
        Assert.Equal(24, Unsafe.SizeOf<CudaApply.Piece>());
        Assert.Equal(12, (int)Marshal.OffsetOf<CudaApply.Piece>(nameof(CudaApply.Piece.Type)));
        Assert.Equal(20, (int)Marshal.OffsetOf<CudaApply.Piece>(nameof(CudaApply.Piece.Stores)));
        Assert.Equal(24, Unsafe.SizeOf<CudaApply.Store>());
        Assert.Equal(16, (int)Marshal.OffsetOf<CudaApply.Store>(nameof(CudaApply.Store.IsVector)));
        Assert.Equal(12, Unsafe.SizeOf<SampleResult>());
        Assert.Equal(8, (int)Marshal.OffsetOf<SampleResult>(nameof(SampleResult.SamplingLogProb)));
    }

    [Fact]
    public void All_libraries_of_the_simulated_device_are_found()
    {
        SimulatedDevice.RequireSimulated();
        Assert.Null(CudaLibraries.Missing(CudaLibraries.Driver, CudaLibraries.Nvrtc, CudaLibraries.CublasLt, CudaLibraries.Nccl));
    }
}
