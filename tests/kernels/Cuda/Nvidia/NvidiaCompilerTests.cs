using System.Buffers.Binary;
using Xunit;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>NVIDIA's own compiler accepts every kernel: that g++ does, for the simulated device, says nothing about inline PTX.</summary>
public sealed class NvidiaCompilerTests
{
    public static TheoryData<string, bool> Targets => new()
    {
        { "sm_80", false }, { "sm_80", true }, { "sm_90", false }, { "sm_90", true }, { "sm_90a", false }, { "sm_90a", true },
    };

    [Theory, MemberData(nameof(Targets))]
    public async Task Every_kernel_compiles(string architecture, bool fp32)
    {
        const int Cuda = 190; // EM_CUDA
        SortedDictionary<string, byte[]> code = (await CompiledKernels.Of(architecture, fp32)).Code;
        foreach (byte[] cubin in code.Values)
        {
            Assert.Equal(0x7F454C46u, BinaryPrimitives.ReadUInt32BigEndian(cubin));
            Assert.Equal(Cuda, BinaryPrimitives.ReadUInt16LittleEndian(cubin.AsSpan(18)));
        }
    }
}
