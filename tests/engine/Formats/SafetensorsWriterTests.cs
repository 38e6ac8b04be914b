using System.Text;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class SafetensorsWriterTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_file_of_transformers_is_written_again_byte_for_byte()
    {
        using SafetensorsFile file = SafetensorsFile.Open(GoldenFiles.Get("llama", "model.safetensors"));
        SafetensorsWriter.Write(_folder["a.safetensors"], file.Tensors.Values.OrderBy(tensor => tensor.Offset).Select(tensor =>
        {
            byte[] bytes = new byte[tensor.Bytes];
            file.Read(tensor, 0, bytes);
            return (new TensorDeclaration(tensor.Name, tensor.DType!.Value, tensor.Shape), bytes);
        }));

        Assert.Equal(File.ReadAllBytes(file.Path), File.ReadAllBytes(_folder["a.safetensors"]));
    }

    /// <summary>transformers refuses a file without the format, and a mapped file is only aligned where its data section is.</summary>
    [Theory]
    [InlineData("a", 88, 88)]
    [InlineData("ab", 89, 96)]
    [InlineData("abcdefgh", 95, 96)]
    public void A_header_says_pt_and_ends_at_a_multiple_of_8_bytes(string name, int unpadded, byte padded)
    {
        string path = _folder["a.safetensors"];
        SafetensorsWriter.Write(path, [(new TensorDeclaration(name, DType.BFloat16, [2, 1]), [1, 2, 3, 4])]);

        string header = $$$"""{"__metadata__":{"format":"pt"},"{{{name}}}":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}""";
        Assert.Equal(unpadded, header.Length);
        byte[] text = Encoding.UTF8.GetBytes(header.PadRight(padded));
        Assert.Equal([padded, 0, 0, 0, 0, 0, 0, 0, .. text, 1, 2, 3, 4], File.ReadAllBytes(path));
    }

    [Fact]
    public void A_writer_that_is_not_completed_leaves_no_file()
    {
        string path = _folder["a.safetensors"];
        using (SafetensorsWriter writer = new(path, [new("a", DType.Float32, [2])]))
        {
            writer.Write(new byte[4]);
            Assert.Throws<InvalidOperationException>(writer.Complete);
            Assert.Throws<ArgumentException>(() => writer.Write(new byte[5]));
        }
        Assert.False(File.Exists(path));
    }

    [Fact]
    public void A_writer_refuses_names_and_shapes_that_no_file_can_have()
    {
        TensorDeclaration a = new("a", DType.Float32, [1]);
        Assert.Throws<ArgumentException>(() => new SafetensorsWriter(_folder["x"], [a, a]));
        Assert.Throws<ArgumentException>(() => new SafetensorsWriter(_folder["x"], [a with { Name = "__metadata__" }]));
        Assert.Throws<ArgumentException>(() => new SafetensorsWriter(_folder["x"], [a with { Shape = [-1] }]));
        Assert.Throws<ArgumentException>(() => SafetensorsWriter.Write(_folder["x"], [(a, new byte[3])]));
    }

    [Theory]
    [InlineData(1L << 62)]
    [InlineData(1L << 32, 1L << 32)]
    [InlineData(1L << 31, 1L << 31, 1L)]
    public void A_writer_refuses_tensors_longer_than_any_file(params long[] shape)
    {
        Assert.Throws<OverflowException>(() => new SafetensorsWriter(_folder["x"], [new("a", DType.Float32, shape)]));
        Assert.False(File.Exists(_folder["x"]));
    }

    /// <summary>Who writes the last byte and fails then may have written wrong ones: only Complete says that they are right.</summary>
    [Theory]
    [InlineData(0)]
    [InlineData(8)]
    public void Without_Complete_the_file_goes_and_later_ones_of_its_name_stay(int bytes)
    {
        string path = _folder["a.safetensors"];
        SafetensorsWriter writer = new(path, [new("a", DType.Float32, [2])]);
        writer.Write(new byte[bytes]);
        writer.Dispose();
        Assert.False(File.Exists(path));
        Assert.Empty(_folder.OpenFiles);

        _folder.Write("a.safetensors", "another's");
        writer.Dispose();
        Assert.Equal("another's", File.ReadAllText(path));
    }

    [Fact]
    public void Complete_closes_the_file_and_it_stays()
    {
        string path = _folder["a.safetensors"];
        using (SafetensorsWriter writer = new(path, [new("a", DType.Float32, [2])]))
        {
            writer.Write([1, 2, 3]);
            writer.Write([4, 5, 6, 7, 8]);
            writer.Complete();
            Assert.Empty(_folder.OpenFiles);
        }
        using SafetensorsFile file = SafetensorsFile.Open(path);
        byte[] read = new byte[8];
        file.Read(file.Tensors["a"], 0, read);
        Assert.Equal([1, 2, 3, 4, 5, 6, 7, 8], read);
    }
}
