using System.Buffers.Binary;
using System.Text;
using CsCheck;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class SafetensorsFileTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void Reads_what_transformers_wrote()
    {
        using SafetensorsFile file = SafetensorsFile.Open(GoldenFiles.Get("llama", "model.safetensors"));

        Assert.Equal("pt", file.Metadata["format"]);
        TensorInfo tensor = file.Tensors["model.layers.2.mlp.down_proj.weight"];
        Assert.Equal([64, 160], tensor.Shape);
        Assert.Equal(DType.BFloat16, tensor.DType);
        Assert.Equal(64 * 160, tensor.Elements);
        Assert.Equal(64 * 160 * 2, tensor.Bytes);
        byte[] whole = new byte[tensor.Bytes];
        file.Read(tensor, 0, whole);
        byte[] all = File.ReadAllBytes(file.Path);
        Assert.Equal(all[(int)tensor.Offset..(int)(tensor.Offset + tensor.Bytes)], whole);
        Assert.Equal((file.Tensors.Values.Min(t => t.Offset), file.Tensors.Values.Sum(t => t.Bytes)), (file.DataStart, file.DataBytes));
        byte[] part = new byte[10];
        file.Read(tensor, 6, part);
        Assert.Equal(whole[6..16], part);
    }

    [Fact]
    public void Read_refuses_bytes_outside_the_tensor()
    {
        using SafetensorsFile file = SafetensorsFile.Open(GoldenFiles.Get("llama", "model.safetensors"));
        TensorInfo tensor = file.Tensors["model.norm.weight"];

        Assert.Throws<ArgumentOutOfRangeException>(() => file.Read(tensor, 120, new byte[9]));
        Assert.Throws<ArgumentOutOfRangeException>(() => file.Read(tensor, -1, new byte[1]));
        Assert.Throws<ArgumentOutOfRangeException>(() => file.Read(tensor, long.MaxValue, new byte[1]));
        file.Read(tensor, 128, []);
    }

    [Fact]
    public void Other_dtypes_are_listed_and_not_read()
    {
        string path = WriteRaw(
            """{"steps":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},"q":{"dtype":"NF5","shape":[9],"data_offsets":[16,22]}}""", 22);
        using SafetensorsFile file = SafetensorsFile.Open(path);

        Assert.Null(file.Tensors["steps"].DType);
        Assert.Equal(6, file.Tensors["q"].Bytes);
        InvalidModelException error = Assert.Throws<InvalidModelException>(() => file.Read(file.Tensors["steps"], 0, new byte[16]));
        Assert.Contains("'steps' has dtype I64", error.Message);
    }

    [Fact]
    public void A_file_truncated_after_opening_is_an_error_that_says_so()
    {
        string path = WriteRaw("""{"a":{"dtype":"F32","shape":[100],"data_offsets":[0,400]}}""", 400);
        using SafetensorsFile file = SafetensorsFile.Open(path);
        using (FileStream other = new(path, FileMode.Open, FileAccess.Write, FileShare.ReadWrite))
            other.SetLength(100);

        InvalidModelException error = Assert.Throws<InvalidModelException>(() => file.Read(file.Tensors["a"], 0, new byte[400]));
        Assert.Contains("'a' is cut off", error.Message);
    }

    [Theory]
    [InlineData("[]", 0, "not a JSON object")]
    [InlineData("", 0, "not valid JSON")]
    [InlineData("{", 0, "not valid JSON")]
    [InlineData("{}}", 0, "not valid JSON")]
    [InlineData("""{"a":{}}""", 0, "must have dtype, shape and two data_offsets")]
    [InlineData("""{"a":7}""", 0, "'a' must be an object")]
    [InlineData("""{"a":[{"b":1},2]}""", 0, "'a' must be an object")]
    [InlineData("""{"\ud800":{}}""", 0, "not valid Unicode")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}""", 4, "unknown field 'x'")]
    [InlineData("""{"a":{"dtype":1,"shape":[1],"data_offsets":[0,4]}}""", 4, "dtype of tensor 'a' must be a string")]
    [InlineData("""{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}""", 4, "dtype of tensor 'a' appears twice")]
    [InlineData("""{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}""", 4, "shape of tensor 'a' must be an array of non-negative")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}""", 4, "shape of tensor 'a' must be an array of non-negative")]
    [InlineData("""{"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}}""", 4, "shape of tensor 'a' must be an array of non-negative")]
    [InlineData("""{"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}}""", 4, "shape of tensor 'a' must be an array of non-negative")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1e99],"data_offsets":[0,4]}}""", 4, "shape of tensor 'a' must be an array of non-negative")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}""", 4, "more than 16 entries")]
    [InlineData("""{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}""", 4, "too large")]
    [InlineData("""{"a":{"dtype":"F32","shape":[4611686018427387904,2],"data_offsets":[0,4]}}""", 4, "too large")]
    [InlineData("""{"a":{"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]}}""", 4, "has 4 bytes, not those of")]
    [InlineData("""{"a":{"dtype":"F32","shape":[2305843009213693952],"data_offsets":[0,0]}}""", 0, "has 0 bytes, not those of")]
    [InlineData("""{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}""", 4, "'a' has 4 bytes, not those of [2] F32")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}""", 4, "two data_offsets")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}""", 4, "more than 2 entries")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}""", 4, "end before they begin")]
    [InlineData("""{"a":{"dtype":"F32","shape":[0],"data_offsets":[9223372036854775807,9223372036854775807]}}""", 4, "out of range")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}""", 3, "truncated?")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}""", 5, "the last 1 bytes of the file belong to no tensor")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}""", 6, "2 bytes before tensor 'a' belong to no tensor")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}}""",
        5, "'b' overlaps 'a'")]
    [InlineData("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}""",
        8, "'a' appears twice")]
    [InlineData("""{"__metadata__":{"a":1}}""", 0, "__metadata__ 'a' must be a string")]
    [InlineData("""{"__metadata__":{"a":"1","a":"2"}}""", 0, "__metadata__ 'a' appears twice")]
    [InlineData("""{"__metadata__":{},"__metadata__":{}}""", 0, "__metadata__ appears twice")]
    [InlineData("""{"__metadata__":"a"}""", 0, "__metadata__ must be an object of strings")]
    public void A_header_that_lies_is_refused(string header, int dataBytes, string problem)
    {
        string path = WriteRaw(header, dataBytes);

        InvalidModelException error = Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(path));
        Assert.Contains(problem, error.Message);
        Assert.Equal(path, error.Path);
    }

    /// <summary>Entries of a header and what is wrong with each. What is nested in one must not be taken for the next one.</summary>
    private static (string Entry, string[] Problems)[] Entries { get; } =
    [
        ("""'a':{'dtype':'F32','shape':[1],'data_offsets':[0,4]}""", []),
        ("""'b':7""", ["tensor 'b' must be an object with dtype, shape and data_offsets"]),
        ("""'c':[{'dtype':'F32'},[1,{'x':2}]]""", ["tensor 'c' must be an object with dtype, shape and data_offsets"]),
        ("""'d':{'dtype':{'dtype':'F32','shape':[1]},'shape':[1],'data_offsets':[0,4]}""", ["dtype of tensor 'd' must be a string"]),
        ("""'e':{'dtype':'F32','shape':[[1],{'shape':[2]},-1],'data_offsets':{'data_offsets':[0,4]}}""",
            ["shape of tensor 'e' must be an array of non-negative integers",
                "data_offsets of tensor 'e' must be an array of non-negative integers"]),
        ("""'f':{'x':{'y':[1,{'dtype':2}]},'dtype':'F32','shape':[1],'data_offsets':[0,4]}""", ["tensor 'f' has an unknown field 'x'"]),
        ("""'g':{'dtype':'F32','shape':[1],'shape':[1],'data_offsets':[0,4],'dtype':'F32','data_offsets':[0,4]}""",
            ["shape of tensor 'g' appears twice", "dtype of tensor 'g' appears twice", "data_offsets of tensor 'g' appears twice"]),
        ("""'h':{'shape':[1],'data_offsets':[0,4]}""", ["tensor 'h' must have dtype, shape and two data_offsets"]),
        ("""'i':{'dtype':'F32','data_offsets':[0,4]}""", ["tensor 'i' must have dtype, shape and two data_offsets"]),
        ("""'j':{'dtype':'F32','shape':[1]}""", ["tensor 'j' must have dtype, shape and two data_offsets"]),
        ("""'k':{'dtype':'F32','shape':[2],'data_offsets':[4,8]}""", ["tensor 'k' has 4 bytes, not those of [2] F32"]),
        ("""'l':{'dtype':'F32','shape':[1],'data_offsets':[9,4]}""", ["data_offsets of tensor 'l' end before they begin: [9, 4]"]),
    ];

    private static (string Entry, string[] Problems)[] MetadataEntries { get; } =
    [
        ("""'__metadata__':{'format':'pt'}""", []),
        ("""'__metadata__':'pt'""", ["__metadata__ must be an object of strings"]),
        ("""'__metadata__':[{'format':'pt'},['pt']]""", ["__metadata__ must be an object of strings"]),
        ("""'__metadata__':{'a':{'b':'c'},'d':['e',{'f':1}],'g':'h','g':'i'}""",
            ["__metadata__ 'a' must be a string", "__metadata__ 'd' must be a string", "__metadata__ 'g' appears twice"]),
        ("""'__metadata__':{},'__metadata__':{'a':{'b':1}},'__metadata__':[{}]""",
            ["__metadata__ appears twice in the header", "__metadata__ appears twice in the header"]),
    ];

    [Fact]
    public void All_problems_of_all_entries_are_reported_at_once() =>
        Gen.Select(Gen.Shuffle(Entries), Gen.Shuffle(MetadataEntries), Gen.Int[0, Entries.Length]).Sample((some, metadata, at) =>
        {
            List<(string Entry, string[] Problems)> entries = [.. some];
            entries.Insert(at, metadata[0]);
            string path = WriteRaw($"{{{string.Join(',', entries.Select(entry => entry.Entry)).Replace('\'', '"')}}}", 4);

            InvalidModelException error = Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(path));
            Assert.Equal(entries.SelectMany(entry => entry.Problems), error.Problems);
        }, iter: 100, threads: 1);

    [Fact]
    public void All_gaps_and_overlaps_are_reported_at_once()
    {
        const string Header = """
            {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]},
             "c":{"dtype":"F32","shape":[1],"data_offsets":[7,11]}}
            """;
        int start = 8 + Header.Length;

        InvalidModelException error = Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(WriteRaw(Header, 6)));
        Assert.Equal(["tensor 'b' overlaps 'a'", "2 bytes before tensor 'c' belong to no tensor",
            $"tensor 'c' ends at byte {start + 11}, the file at {start + 6}: truncated?"], error.Problems);
    }

    /// <summary>All types of the format.</summary>
    [Theory]
    [InlineData(4, "F4")]
    [InlineData(6, "F6_E2M3", "F6_E3M2")]
    [InlineData(8, "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")]
    [InlineData(16, "I16", "U16", "F16", "BF16")]
    [InlineData(32, "I32", "U32", "F32")]
    [InlineData(64, "I64", "U64", "F64", "C64")]
    public void A_tensor_has_the_bytes_of_its_type_or_the_file_is_refused(int bits, params string[] types)
    {
        foreach (string type in types)
        {
            string Write(int bytes) => WriteRaw($$$"""{"a":{"dtype":"{{{type}}}","shape":[2,4],"data_offsets":[0,{{{bytes}}}]}}""", bytes);
            using (SafetensorsFile file = SafetensorsFile.Open(Write(bits)))
                Assert.Equal((type, bits), (file.Tensors["a"].DTypeName, file.Tensors["a"].Bytes));
            foreach (int bytes in (int[])[0, bits - 1, bits + 1, 2 * bits])
            {
                InvalidModelException error = Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(Write(bytes)));
                Assert.Equal($"tensor 'a' has {bytes} bytes, not those of [2, 4] {type}", Assert.Single(error.Problems));
            }
        }
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void A_tensor_that_ends_inside_a_byte_is_refused(int bytes)
    {
        string path = WriteRaw($$$"""{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,{{{bytes}}}]}}""", bytes);

        Assert.Contains("not those of [3] F4", Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(path)).Message);
    }

    [Fact]
    public void A_header_may_have_100_million_bytes_and_not_one_more()
    {
        const int Most = 100_000_000;
        byte[] bytes = new byte[8 + Most];
        bytes.AsSpan().Fill((byte)' ');
        BinaryPrimitives.WriteInt64LittleEndian(bytes, Most);
        "{}"u8.CopyTo(bytes.AsSpan(8));
        string path = _folder.Write("long.safetensors", bytes);
        using (SafetensorsFile file = SafetensorsFile.Open(path)) Assert.Equal((8 + Most, 0), (file.DataStart, file.DataBytes));

        using (FileStream file = File.OpenWrite(path))
        {
            file.Write([(Most + 1) & 255]);
            file.SetLength(8 + Most + 1);
        }
        Assert.Contains("the format allows", Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(path)).Message);
    }

    [Fact]
    public void A_refused_file_is_not_left_open()
    {
        string path = WriteRaw("[]", 0);

        Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(path));
        Assert.Empty(_folder.OpenFiles);
    }

    [Theory]
    [InlineData(new byte[0], "it is empty, or not a regular file")]
    [InlineData(new byte[] { 2, 0, 0, 0, 0, 0, 0 }, "too few")]
    [InlineData(new byte[] { 2, 0, 0, 0, 0, 0, 0, 0 }, "truncated?")]
    [InlineData(new byte[] { 255, 255, 255, 255, 255, 255, 255, 255, 0 }, "the format allows")]
    [InlineData(new byte[] { 0, 0, 0, 16, 0, 0, 0, 0, 0 }, "the format allows")]
    [InlineData(new byte[] { 2, 0, 0, 0, 0, 0, 0, 0, 0xC3, 0x28 }, "not valid UTF-8")]
    public void A_header_length_that_lies_is_refused(byte[] bytes, string problem)
    {
        InvalidModelException error = Assert.Throws<InvalidModelException>(
            () => SafetensorsFile.Open(_folder.Write("a.safetensors", bytes)));
        Assert.Contains(problem, error.Message);
    }

    /// <summary>In a file with holes, so that it takes no room: tensors around offsets that no 32-bit number has.</summary>
    [Fact]
    public void Tensors_lie_beyond_2_to_the_31_and_2_to_the_32()
    {
        const long Step = (1L << 31) - 200; // so that a tensor lies across each border
        string header = string.Join(',', Enumerable.Range(0, 3).Select(i =>
            $"\"{i}\":{{\"dtype\":\"F32\",\"shape\":[{Step / 4}],\"data_offsets\":[{i * Step},{(i + 1) * Step}]}}"));
        string path = WriteRaw("{" + header + "}", 0);
        byte[] Mark(int tensor, long at) => [(byte)(tensor + 1), (byte)at, (byte)(at >> 31), 7];
        using (FileStream stream = new(path, FileMode.Open, FileAccess.ReadWrite))
        {
            long start = stream.Length;
            stream.SetLength(start + 3 * Step);
            for (int tensor = 0; tensor < 3; tensor++)
            {
                foreach (long at in (long[])[0, Step / 2 / 4 * 4, Step - 4])
                {
                    stream.Position = start + tensor * Step + at;
                    stream.Write(Mark(tensor, at));
                }
            }
        }
        using SafetensorsFile file = SafetensorsFile.Open(path);
        for (int tensor = 0; tensor < 3; tensor++)
        {
            TensorInfo info = file.Tensors[$"{tensor}"];
            Assert.Equal((Step, Step / 4), (info.Bytes, info.Elements));
            foreach (long at in (long[])[0, Step / 2 / 4 * 4, Step - 4])
            {
                byte[] read = new byte[4];
                file.Read(info, at, read);
                Assert.Equal(Mark(tensor, at), read);
            }
            Assert.Throws<ArgumentOutOfRangeException>(() => file.Read(info, Step - 3, new byte[4]));
        }
    }

    [Fact]
    public void Elements_are_counted_beyond_2_to_the_31()
        => Assert.Equal(1L << 40, new TensorInfo("a", "BF16", [1 << 20, 1 << 20], 8, 1L << 41).Elements);

    [Fact]
    public void Empty_tensors_may_lie_where_others_begin()
    {
        string path = WriteRaw("""
            {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},
             "c":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}
            """, 4);
        using SafetensorsFile file = SafetensorsFile.Open(path);
        Assert.Equal(3, file.Tensors.Count);
    }

    [Fact]
    public void A_missing_file_and_a_folder_are_refused()
    {
        Assert.Contains("cannot be read", Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(_folder["none"])).Message);
        Assert.Contains("cannot be read", Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(_folder.Path)).Message);
    }

    [Fact]
    public void A_header_of_nothing_but_problems_is_not_collected_without_end()
    {
        string header = "{" + string.Join(',', Enumerable.Repeat("\"a\":1", 100_000)) + "}";

        InvalidModelException error = Assert.Throws<InvalidModelException>(() => SafetensorsFile.Open(WriteRaw(header, 0)));
        Assert.Equal(1001, error.Problems.Count);
        Assert.InRange(error.Message.Length, 1, 10_000);
    }

    [Fact]
    public void Anything_written_reads_back() =>
        GenTensors.Sample(tensors =>
        {
            string path = _folder[Guid.NewGuid().ToString()];
            SafetensorsWriter.Write(path, tensors);
            using SafetensorsFile file = SafetensorsFile.Open(path);
            Assert.Equal((tensors.Length, 0), (file.Tensors.Count, file.DataStart % 8));
            foreach ((TensorDeclaration? tensor, byte[]? bytes) in tensors)
            {
                TensorInfo info = file.Tensors[tensor.Name];
                Assert.Equal(tensor.Shape, info.Shape);
                Assert.Equal(tensor.Type, info.DType);
                byte[] read = new byte[info.Bytes];
                file.Read(info, 0, read);
                Assert.Equal(bytes, read);
            }
        }, iter: 100);

    [Fact]
    public void A_corrupt_header_is_refused_or_describes_tensors_inside_the_file() =>
        Gen.Select(GenTensors, Gen.Select(Gen.UInt, Gen.Byte).Array[1, 4]).Sample((tensors, changes) =>
        {
            string path = _folder[Guid.NewGuid().ToString()];
            SafetensorsWriter.Write(path, tensors);
            byte[] bytes = File.ReadAllBytes(path);
            int header = 8 + BinaryPrimitives.ReadInt32LittleEndian(bytes);
            foreach ((uint at, byte value) in changes)
                bytes[at % header] = value;
            File.WriteAllBytes(path, bytes);
            long before = GC.GetAllocatedBytesForCurrentThread();
            try
            {
                using SafetensorsFile file = SafetensorsFile.Open(path);
                byte[] buffer = new byte[16];
                foreach (TensorInfo tensor in file.Tensors.Values)
                {
                    Assert.InRange(tensor.Offset, 8, bytes.Length);
                    Assert.InRange(tensor.Bytes, 0, bytes.Length - tensor.Offset);
                    if (tensor.DType is { } type)
                    {
                        Assert.Equal(tensor.Bytes, tensor.Elements * type.Size());
                        file.Read(tensor, 0, buffer.AsSpan(0, (int)Math.Min(16, tensor.Bytes)));
                    }
                }
            }
            catch (InvalidModelException)
            {
            }
            Assert.InRange(GC.GetAllocatedBytesForCurrentThread() - before, 0, 1 << 20);
        }, iter: 500);

    private static Gen<(TensorDeclaration Tensor, byte[] Bytes)[]> GenTensors { get; } =
        Gen.Select(Gen.String[Gen.Char["ab.\"\\é\u4e2d\n"], 0, 6], Gen.Enum<DType>(), Gen.Long[0, 4].Array[0, 3], Gen.Byte)
            .Select((name, type, shape, fill) =>
            {
                TensorDeclaration tensor = new(name, type, shape);
                byte[] bytes = new byte[tensor.Bytes];
                for (int i = 0; i < bytes.Length; i++)
                    bytes[i] = (byte)(fill + i);
                return (tensor, bytes);
            })
            .Array[0, 5]
            .Select(tensors => tensors.DistinctBy(entry => entry.tensor.Name).ToArray());

    private string WriteRaw(string header, int dataBytes)
    {
        byte[] json = Encoding.UTF8.GetBytes(header);
        byte[] bytes = new byte[8 + json.Length + dataBytes];
        BinaryPrimitives.WriteInt64LittleEndian(bytes, json.Length);
        json.CopyTo(bytes, 8);
        return _folder.Write("raw.safetensors", bytes);
    }
}
