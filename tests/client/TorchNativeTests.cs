using System.Text;
using Rollout.Client.Torch;
using TorchSharp;
using Xunit;

namespace Rollout.Client.Tests;

public sealed class TorchNativeTests
{
    [Fact]
    public void Matmul_works_once_loaded()
    {
        TorchNative.EnsureLoaded();
        TorchNative.EnsureLoaded();
        using DisposeScope scope = torch.NewDisposeScope();
        torch.Tensor product = torch.ones(3, 4).matmul(torch.full(4, 5, 2f));
        Assert.Equal(8f, product.min().item<float>());
        Assert.Equal(8f, product.max().item<float>());
    }

    [Fact]
    public unsafe void The_address_of_a_tensor_is_that_of_its_first_element()
    {
        TorchNative.EnsureLoaded();
        using DisposeScope scope = torch.NewDisposeScope();
        torch.Tensor tensor = torch.arange(20, torch.float32).reshape(4, 5);
        Assert.Equal(tensor.data<float>().ToArray(), new Span<float>((void*)TorchNative.AddressOf(tensor), 20).ToArray());
        Assert.Equal(TorchNative.AddressOf(tensor) + 2 * 5 * sizeof(float), TorchNative.AddressOf(tensor[2]));
    }

    [Fact]
    public void Finds_the_needs_of_the_real_library()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "the library is an ELF file on Linux only");
        IReadOnlyList<ElfVersionNeed> needs = RealLibrary(out _).Needs;
        Assert.Contains(needs, need => need is { Library: "libc.so.6", Name: "GLIBC_2.34", IsWeak: false });
        ElfVersionNeed unused = Assert.Single(needs, need => need.Name == TorchNative.UnusedVersion);
        Assert.Equal("libstdc++.so.6", unused.Library);
        Assert.False(unused.IsWeak);
        Assert.Equal(needs.Count, needs.Select(need => need.Index).Distinct().Count());
    }

    [Fact]
    public void Marking_weak_changes_one_flag_and_nothing_else()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "the library is an ELF file on Linux only");
        ElfVersions elf = RealLibrary(out byte[]? image);
        byte[] before = image.ToArray();
        ElfVersionNeed unused = elf.Needs.Single(need => need.Name == TorchNative.UnusedVersion);
        elf.MarkWeak(unused);
        int[] changed = Enumerable.Range(0, image.Length).Where(i => image[i] != before[i]).ToArray();
        Assert.Equal([unused.FlagsOffset], changed);
        Assert.Equal(before[unused.FlagsOffset] | 2, image[unused.FlagsOffset]);
        IReadOnlyList<ElfVersionNeed> again = new ElfVersions(image, "again").Needs;
        Assert.Equal([TorchNative.UnusedVersion], again.Where(need => need.IsWeak).Select(need => need.Name));
    }

    [Fact]
    public void Refuses_to_weaken_a_version_that_is_used()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "the library is an ELF file on Linux only");
        ElfVersions elf = RealLibrary(out byte[]? image);
        byte[] before = image.ToArray();
        ElfVersionNeed used = elf.Needs.Single(need => need is { Library: "libstdc++.so.6", Name: "GLIBCXX_3.4.21" });
        InvalidOperationException error = Assert.Throws<InvalidOperationException>(() => elf.MarkWeak(used));
        Assert.Contains("GLIBCXX_3.4.21", error.Message);
        Assert.Equal(before, image);
    }

    [Fact]
    public async Task Many_writers_at_once_leave_one_whole_copy()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "the library is an ELF file on Linux only");
        string cache = Directory.CreateTempSubdirectory("rollout-test-").FullName;
        try
        {
            string library = TorchNative.FindLibrary()!;
            string[] copies = await Task.WhenAll(Enumerable.Range(0, 8).Select(_ => Task.Run(() => TorchNative.Mend(library, cache))));
            string copy = Assert.Single(copies.Distinct());
            Assert.Equal([copy], Directory.GetFiles(cache, "*", SearchOption.AllDirectories));
            Assert.True(new ElfVersions(File.ReadAllBytes(copy), copy).Needs.Single(n => n.Name == TorchNative.UnusedVersion).IsWeak);

            // A copy that something damaged is replaced, not trusted.
            File.WriteAllBytes(copy, [1, 2, 3]);
            Assert.Equal(copy, TorchNative.Mend(library, cache));
            Assert.Equal(new FileInfo(library).Length, new FileInfo(copy).Length);
        }
        finally
        {
            Directory.Delete(cache, recursive: true);
        }
    }

    public static TheoryData<string, byte[]> NotElf64() => new()
    {
        { "does not start with an ELF header", [] },
        { "does not start with an ELF header", Encoding.ASCII.GetBytes(new string('#', 100)) },
        { "32-bit", Header(bits: 1) },
        { "big-endian", Header(endian: 2) },
        { "not a shared library", Header(type: 2) },
        { "program headers", Header(headerSize: 32) },
        { "cut short", Header(headers: 3) },
        { "no dynamic section", Header() },
    };

    [Theory]
    [MemberData(nameof(NotElf64))]
    public void Refuses_what_is_not_ELF64_and_says_why(string reason, byte[] image)
    {
        BadImageFormatException error = Assert.Throws<BadImageFormatException>(() => new ElfVersions(image, "some.so"));
        Assert.Contains(reason, error.Message);
        Assert.StartsWith("some.so is not a 64-bit", error.Message);
    }

    [Fact]
    public void A_library_cut_anywhere_is_refused_or_read_never_worse()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "the library is an ELF file on Linux only");
        IReadOnlyList<ElfVersionNeed> whole = RealLibrary(out byte[]? image).Needs;
        for (int length = 0; length < image.Length; length += 40_009)
        {
            // Past the last segment there is nothing the loader reads, so such a cut does no harm.
            Exception? error = Record.Exception(() => Assert.Equal(whole, new ElfVersions(image[..length], "cut.so").Needs));
            Assert.True(error is null or BadImageFormatException, $"cut at {length}: {error}");
            Assert.True(error is not null || length > image.Length / 2, $"cut at {length} was accepted");
        }
    }

    private static ElfVersions RealLibrary(out byte[] image)
    {
        string? path = TorchNative.FindLibrary();
        Assert.NotNull(path);
        image = File.ReadAllBytes(path);
        return new(image, path);
    }

    private static byte[] Header(byte bits = 2, byte endian = 1, byte type = 3, byte headerSize = 56, byte headers = 0)
    {
        byte[] header = new byte[64];
        "\u007fELF"u8.CopyTo(header);
        (header[4], header[5], header[16], header[32], header[54], header[56]) = (bits, endian, type, 64, headerSize, headers);
        return header;
    }
}
