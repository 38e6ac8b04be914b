using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>Compiled kernels cached on disk: the code read back is what was compiled from the same source.</summary>
public sealed class CudaCompilerTests : IDisposable
{
    private readonly string _name = $"kept{Path.GetRandomFileName().Replace(".", "", StringComparison.Ordinal)}";

    public CudaCompilerTests()
    {
        SimulatedDevice.RequireSimulated();
        Assert.Null(CudaLibraries.Missing(CudaLibraries.Nvrtc));
    }

    public void Dispose()
    {
        foreach (string file in Files())
            File.Delete(file);
    }

    [Theory]
    [InlineData("empty")]
    [InlineData("half")]
    [InlineData("a byte")]
    [InlineData("longer")]
    public void A_damaged_file_is_compiled_again_and_mended(string damage)
    {
        byte[] code = Compile();
        string file = Assert.Single(Files());
        byte[] kept = File.ReadAllBytes(file), damaged = [.. kept];
        damaged[kept.Length / 3] ^= 0x10;
        File.WriteAllBytes(file, damage switch
        {
            "empty" => [],
            "half" => kept[..(kept.Length / 2)],
            "a byte" => damaged,
            _ => [.. kept, 0],
        });
        byte[] again = Compile(); // the same except for the build id that a linker adds
        Assert.Equal((code.Length, code[kept.Length / 3]), (again.Length, again[kept.Length / 3]));
        Assert.Equal(kept.Length, File.ReadAllBytes(Assert.Single(Files())).Length);
        Assert.Equal(again, Compile());
    }

    [Fact]
    public void What_is_kept_is_not_compiled_again()
    {
        byte[] code = Compile();
        DateTime written = File.GetLastWriteTimeUtc(Assert.Single(Files()));
        Assert.Equal(code, Compile());
        Assert.Equal(written, File.GetLastWriteTimeUtc(Assert.Single(Files())));
    }

    /// <summary>A newer version may differ in a header or an option alone.</summary>
    [Fact]
    public void Whatever_goes_into_the_code_makes_it_another()
    {
        byte[][] codes = [Compile(), Compile(source: 2), Compile(header: 2), Compile(option: 2)];
        Assert.Equal(4, codes.Select(Convert.ToHexString).Distinct().Count());
        Assert.Equal(4, Files().Length);
    }

    private string[] Files() => Directory.GetFiles(CudaCompiler.CacheFolder, $"{_name}-*");

    private byte[] Compile(int source = 1, int header = 1, int option = 1) => CudaCompiler.Compile(
        $"{_name}.cu",
        $"#include \"values.cuh\"\nextern \"C\" int values[3] = {{{source}, HEADER, OPTION}};",
        new Dictionary<string, string> { ["values.cuh"] = $"#define HEADER {header}\n" },
        [$"-DOPTION={option}"]);
}
